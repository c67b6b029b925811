"""Every error Switchyard raises on purpose.

SwitchyardError
├── BadInput              a file, plan, flag or setting that the user can fix           exit code 2
├── EngineError           an engine could not do what was asked                         exit code 5
│   ├── EngineNotFound    no binary and no wheel of it on this machine
│   ├── PortTaken         another process listens on the port that was asked for
│   ├── EngineExited      it died: exit status and last log lines
│   ├── EngineStalled     it is alive, but loading made no progress for `stall_s`
│   ├── EngineRefuses     it is up and answers, but no completion: another start would end in the same way
│   ├── EngineNotEnded    SIGKILL did not end it
│   └── WrongListener     the port answers, but it is not our child that listens there
└── NoMeasurement         asked for a number of which there are no samples
"""

from __future__ import annotations

from engines.redaction import redacted_text


class SwitchyardError(Exception):
    """Base of all of Switchyard's errors; its text is one line: what, where and how to fix it, without secrets."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted_text(str(message)))  # engines quote the keys that they were sent


class BadInput(SwitchyardError):
    """A file, plan, flag or setting that the user can fix."""


class NoMeasurement(SwitchyardError):
    """A statistic was asked of samples that do not exist; absent is not zero."""


class EngineError(SwitchyardError):
    """An engine could not do what was asked; `log_tail` holds its last log lines, oldest first."""

    def __init__(self, message: str, *, engine: str = "", log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.engine = engine
        self.log_tail = log_tail


class EngineNotFound(EngineError):
    """No binary and no wheel of the engine on this machine."""


class PortTaken(EngineError):
    """Another process listens on the port that was asked for."""


class EngineExited(EngineError):
    """The engine's process ended; `returncode` is negative for a signal."""

    def __init__(self, message: str, *, returncode: int, engine: str = "", log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message, engine=engine, log_tail=log_tail)
        self.returncode = returncode


class EngineStalled(EngineError):
    """The engine is alive but loading made no progress (log, memory, disk) for `stalled_s` seconds."""

    def __init__(self, message: str, *, stalled_s: float, engine: str = "", log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message, engine=engine, log_tail=log_tail)
        self.stalled_s = stalled_s


class EngineRefuses(EngineError):
    """The engine is up and answers, but refuses every completion (an embedding server does): no restart helps."""


class EngineNotEnded(EngineError):
    """SIGKILL did not end the engine's process: the kernel holds it, and its memory stays taken."""


class WrongListener(EngineError):
    """The port answers, but it is not our child that listens there."""
