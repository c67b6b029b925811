"""Families of the ways in which people start llama-server: every flag read, everything else named.

`{M}` is a folder with a.gguf, b.gguf and l1.gguf, `{S}` the one above it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.errors import BadInput
from engines.llama_cpp.argv import OPEN
from engines.llama_cpp.commands import parse_commands

IMAGE_HUB = Path("/", "root", ".cache/huggingface/hub")  # in an image, whose user is root
SERVER = "ghcr.io/ggml-org/llama.cpp:server"
HUB = "/hub/models--org--m-GGUF/snapshots/abc"
KEY = "sk-secretsecret12345678"
UNIT = "[Service]\nExecStart=/usr/bin/llama-server "
POD = "apiVersion: v1\nkind: Pod\nspec:\n  {network}\n  containers:\n  - name: llama\n    image: " + SERVER
POD_VOLUMES = "\n    volumeMounts: [{name: m, mountPath: /models}]\n  volumes: [{name: m, hostPath: {path: '{M}'}}]\n"
COMPOSE = "services:\n  llama:\n    image: " + SERVER + "\n    volumes: ['{M}:/models']\n"
SWAP = "macros: {srv: '/opt/llama-server --port ${PORT}'}\nmodels:\n"
PLIST = "<plist version='1.0'><dict><key>ProgramArguments</key><array>{}</array></dict></plist>"

# text -> what is read of it; the model is {M}/a.gguf and nothing is named, where nothing else is said
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # systemd
    "comment in a continuation": (
        UNIT + "-m {M}/a.gguf \\\n  # why\n  --port 81 \\\n  --temp 0.6\n",
        {"port": 81, "args": ["--temp", "0.6"]},
    ),
    "backslashes of a regex": (
        UNIT + r"-m {M}/a.gguf -ot blk\.(1|2)\.ffn_.*=CPU",
        {"args": ["-ot", r"blk\.(1|2)\.ffn_.*=CPU"]},
    ),
    "doubled signs": (UNIT + '-m {M}/a.gguf -a "a$$b%%"', {"names": ["a$b%"]}),
    "an empty value takes back": (
        '[Service]\nEnvironment=GGML_A=1\nEnvironment=\nEnvironment=GGML_B="two words"\nExecStart=/x\nExecStart=\n'
        "ExecStart=/usr/bin/llama-server -m {M}/a.gguf",
        {"env": {"GGML_B": "two words"}},
    ),
    "a drop-in": (
        UNIT + "-m {M}/b.gguf\n# override.conf\n[Service]\nExecStart=\nExecStart=/usr/bin/llama-server -m {M}/a.gguf",
        {},
    ),
    "an environment file": (
        UNIT + "--port ${PORT} $MORE\nEnvironmentFile={S}/vars",
        {"port": 91, "args": ["--temp", "0.5"], "env": {"GGML_X": "3"}, "has_api_key": True, "notes": ["--api-key"]},
    ),
    "an environment file that is not here": (
        UNIT + "-m {M}/a.gguf\nEnvironmentFile=-/no/vars",
        {"notes": ["EnvironmentFile -/no/vars"]},
    ),
    "a variable of nobody": (UNIT + "-m {M}/a.gguf --port=82 $MORE", {"port": 82, "notes": [f"$MORE: {OPEN}"]}),
    "an instance": (UNIT + "-m {M}/a.gguf -a %i", {"names": [], "notes": ["-a ${%i}"]}),
    "a shell in a unit": (
        "[Service]\nExecStart=/bin/sh -c 'exec llama-server -m {M}/a.gguf --port ${P:-83} >> /log 2>&1'",
        {"port": 83},
    ),
    "limits of a unit": (UNIT + "-m {M}/a.gguf\nNice=-5\nCPUAffinity=0-3", {"notes": ["Nice= CPUAffinity="]}),
    "supervisor": (
        '[program:llama]\ncommand=/opt/llama-server -m models/a.gguf\ndirectory={S}\nenvironment=GGML_A="0",GGML_B="1"',
        {"env": {"GGML_A": "0", "GGML_B": "1"}, "binary": "/opt/llama-server"},
    ),
    # containers
    "a quadlet's own words": (
        "[Container]\nImage=docker.io/x/y\nEntrypoint=/app/llama-server\nMount=type=bind,source={M},target=/m,ro=true\n"
        "Network=host\nSecret=llama,type=env,target=LLAMA_API_KEY\nPodmanArgs=--cpus 4\nExec=-m /m/a.gguf --port 84",
        {
            "port": 84,
            "has_api_key": True,
            "notes": ["--api-key", "variable LLAMA_API_KEY", "--cpus 4", "another build"],
        },
    ),
    "a shell in docker": (
        "docker run -p 85:9000 -v {M}:/m x/y sh -c 'cd /m && llama-server -m a.gguf --port 9000 --host 0.0.0.0'",
        {"port": 85, "notes": ["another build"]},
    ),
    "a flag with an equals sign": (
        f"docker run -p '[::1]:86:8080' -v {{M}}:/m {SERVER} --model=/m/a.gguf --lora-scaled /m/l1.gguf:2,/m/l1.gguf:1",
        {
            "host": "::1",
            "port": 86,
            "args": ["--lora-scaled", "{M}/l1.gguf:2,{M}/l1.gguf:1"],
            "notes": ["another build"],
        },
    ),
    "the working directory": (
        f"cd {{S}} && docker run -p 87:8080 -w /m -v $(pwd)/models:/m {SERVER} -m a.gguf",
        {"port": 87, "notes": ["another build"]},
    ),
    "$PWD": (
        f"cd {{S}} && docker run -p 87:8080 -v $PWD/models:/m {SERVER} -m /m/a.gguf",
        {"port": 87, "notes": ["another build"]},
    ),
    "a seed is no entry point": (
        f"docker run -p 88:8080 -v {{M}}:/m {SERVER} -s 42 -m /m/a.gguf",
        {"port": 88, "seed": 42, "notes": ["another build"]},
    ),
    "a port chosen by docker": (
        f"docker run -p 8080 -v {{M}}:/m {SERVER} -m /m/a.gguf",
        {"port": 8080, "notes": ["another build", "port 8080: outside"]},
    ),
    "limits of a container": (
        f"docker run --gpus device=1 --cpus=4 -p 89:8080 -v {{M}}:/m {SERVER} -m /m/a.gguf",
        {"port": 89, "notes": ["another build", "--gpus device=1", "--cpus 4"]},
    ),
    "a volume with a name": (
        f"docker run -p 90:8080 -v cache:/c -v {{M}}:/m {SERVER} -m /m/a.gguf",
        {"port": 90, "notes": ["another build", "volume cache at /c"]},
    ),
    "a key that the shell has": (
        f"docker run -p 127.0.0.1:90:8080 -e LLAMA_API_KEY -e A=$B -v {{M}}:/m {SERVER} -m /m/a.gguf",
        {"has_api_key": True, "notes": ["another build", "--api-key", "variable LLAMA_API_KEY", f"variable A: {OPEN}"]},
    ),
    "-hf in a container": (
        f"docker run -p 90:8080 -v {{S}}/hub:{IMAGE_HUB} {SERVER} -hf org/m-GGUF:Q8_0",
        {
            "gguf": "{S}" + HUB + "/m-Q8_0.gguf",
            "args": ["--mmproj", "{S}" + HUB + "/mmproj-m.gguf"],
            "notes": ["another build"],
        },
    ),
    "-hf and a variable of the container": (
        f"docker run -p 90:8080 -e HF_HOME=/c -v {{S}}:/c {SERVER} -hf org/m-GGUF --no-mmproj",
        {"gguf": "{S}" + HUB + "/m-Q8_0.gguf", "args": ["--no-mmproj"], "notes": ["another build"]},
    ),
    # compose
    "folded": (
        COMPOSE + "    ports: [92:8080]\n    command: >-\n      -m /models/a.gguf\n      -fa on\n      --temp 0.70\n",
        {"port": 92, "flash_attention": True, "args": ["--temp", "0.70"], "notes": ["another build"]},
    ),
    "words that YAML 1.1 knows": (
        COMPOSE + "    environment: {LLAMA_ARG_FLASH_ATTN: on, LLAMA_ARG_THREADS: 08}\n    ports: ['1:8080']\n"
        "    command: [-m, /models/a.gguf, --jinja, --temp, 0.70, -ctk, on]\n",
        {
            "flash_attention": True,
            "threads": 8,
            "args": ["--jinja", "--temp", "0.70", "-ctk", "on"],
            "notes": ["another build"],
        },
    ),
    "a shell in compose": (
        COMPOSE + "    ports: ['93:80']\n    entrypoint: [/bin/sh, -c]\n"
        "    command: ['cd /models && /app/llama-server -m a.gguf --port 80 --lora /models/l1.gguf']\n",
        {"port": 93, "args": ["--lora", "{M}/l1.gguf"], "notes": ["another build"]},
    ),
    "ranges of ports": (
        COMPOSE + "    ports: ['8136-8137:8079-8080']\n    command: -m /models/a.gguf\n",
        {"port": 8137, "notes": ["another build"]},
    ),
    "a long port": (
        COMPOSE + "    ports: [{target: 8080, published: '94', host_ip: '::1'}]\n    command: -m /models/a.gguf\n",
        {"host": "::1", "port": 94, "notes": ["another build"]},
    ),
    ".env and defaults": (
        COMPOSE
        + "    ports: ['${PORT}:8080']\n    command: -m /models/${MODEL:-b.gguf} -a ${NAME:-${PORT}} --top-k ${TOPK}\n",
        {
            "port": 95,
            "names": ["95"],
            "args": [],
            "notes": ["another build", f"--top-k ${{TOPK}}: {OPEN}", "$TOPK: not set"],
        },
    ),
    "several services": (
        COMPOSE
        + "    ports: ['1:8080']\n    command: -m /models/a.gguf\n  two: {image: '"
        + SERVER
        + "', command: -m /models/b.gguf}\n",
        {"notes": ["another build", "2 containers run llama-server"]},
    ),
    # Kubernetes
    "a shell in a pod": (
        POD.replace("{network}", "restartPolicy: Always")
        + "\n    command: [/bin/sh, -c]\n    args: ['exec llama-server -m /models/a.gguf --lora /models/l1.gguf']\n"
        "    ports: [{containerPort: 8080, hostPort: 96}]" + POD_VOLUMES,
        {"port": 96, "args": ["--lora", "{M}/l1.gguf"], "notes": ["another build"]},
    ),
    "references in a pod": (
        POD.replace("{network}", "hostNetwork: true")
        + "\n    args: [-m, $(DIR)/a.gguf, --port, 97, -a, $(NAME)]\n    env: [{name: DIR, value: /models}]"
        + POD_VOLUMES,
        {"port": 97, "names": [], "notes": ["another build", f"-a $(NAME): {OPEN}"]},
    ),
    # llama-swap
    "lines that go on": (
        SWAP + "  a:\n    cmd: |\n      ${srv} -m {M}/a.gguf \\\n      --temp 0.6\n",
        {"args": ["--temp", "0.6"], "notes": ["its own port"]},
    ),
    "others of llama-swap": (
        SWAP + "  a: {cmd: '${srv} -m {M}/a.gguf'}\n  v: {cmd: vllm serve}\n",
        {"notes": ["its own port", "left out: v"]},
    ),
    "a container of llama-swap": (
        SWAP + "  a:\n    cmd: docker run -p ${PORT}:8080 -v {M}:/m " + SERVER + " -m /m/a.gguf\n",
        {"host": "127.0.0.1", "notes": ["another build", "its own port"]},
    ),
    # shells
    "the script's own folder": (
        'D="$(cd "$(dirname "${BASH_SOURCE[0]}")" >/dev/null 2>&1 && pwd)"\n'
        '. "$D/vars.sh"\n"$D/llama-server" -m "$D/models/a.gguf" -t $N',
        {"binary": "{S}/llama-server", "threads": 3, "context_tokens": 777},
    ),
    "a default that is a path": ('llama-server -m "${MODEL:-$ROOT/a.gguf}" -a ${NAME:-"a b"}', {"names": ["a b"]}),
    "arguments that have defaults": (
        'exec llama-server -m {M}/a.gguf --port ${1:-98} -c ${CTX:=64} "$@"',
        {"port": 98, "context_tokens": 64, "notes": [f"$@: {OPEN}"]},
    ),
    "a value cut to size": ("F={M}/a.gguf.part; llama-server -m ${F%.part} -a ${F##*/}", {"names": ["a.gguf.part"]}),
    "a wildcard and braces": (
        "llama-server -m {M}/a*.gguf -a {b,} --lora {M}/{l1}.gguf",
        {"names": ["b"], "args": ["--lora", "{M}/{l1}.gguf"]},
    ),
    "an open value behind an equals sign": (
        "llama-server -m {M}/a.gguf --jinja --port=$PORT",
        {"port": 8080, "args": ["--jinja"], "notes": [f"--port $PORT: {OPEN}"]},
    ),
    "a key behind an equals sign": (
        "llama-server -m {M}/a.gguf --api-key=$(cat /k)",
        {"has_api_key": True, "notes": ["--api-key"]},
    ),
    "a key in a variable": (
        "export LLAMA_API_KEY=$(cat /k)\nllama-server -m {M}/a.gguf",
        {"has_api_key": True, "notes": ["--api-key"]},
    ),
    "what stands in front": (
        "sudo -u llama taskset -c 0-7 llama-server -m {M}/a.gguf",
        {"notes": ["in front of llama-server: sudo -u llama taskset -c 0-7;"]},
    ),
    "libraries": (
        "LD_LIBRARY_PATH=/opt/l:$LD_LIBRARY_PATH llama-server -m {M}/a.gguf",
        {"env": {"LD_LIBRARY_PATH": "/opt/l"}},
    ),
    "branches": (
        "if x; then N=9; else N=0; fi\nllama-server -m {M}/a.gguf -ngl $N",
        {"gpu_layers": 0, "notes": ["variable N: set in a branch"]},
    ),
    "fish": ("set -x GGML_X 1\nset m {M}/a.gguf\nllama-server -m $m", {"env": {"GGML_X": "1"}}),
    "crontab": ("@reboot cd {S} && /opt/llama-server -m models/a.gguf", {}),
    "/proc/PID/cmdline": ("llama-server\0-m\0{M}/a.gguf\0-a\0a b\0", {"names": ["a b"]}),
    "several -a": ("llama-server -m {M}/a.gguf -a one -a two,three", {"names": ["one", "two", "three"]}),
    "a scale apart": (
        "llama-server -m {M}/a.gguf --lora-scaled {M}/l1.gguf 0.5",
        {"args": ["--lora-scaled", "{M}/l1.gguf", "0.5"]},
    ),
    # Windows
    "cmd": (
        '@echo off\r\nset CUDA_VISIBLE_DEVICES=0\r\nset "D={M}"\r\nrem x\r\n'
        'start "" /b bin\\llama-server.exe -m "%D%/a.gguf" ^\r\n --port 99\r\n',
        {"port": 99, "env": {"CUDA_VISIBLE_DEVICES": "0"}, "binary": "bin/llama-server.exe"},
    ),
    "PowerShell": (
        '$env:CUDA_VISIBLE_DEVICES = "0"\n$m = "{M}/a.gguf"\n& .\\llama-server.exe `\n -m $m `\n --port 99\n',
        {"port": 99, "env": {"CUDA_VISIBLE_DEVICES": "0"}, "binary": "./llama-server.exe"},
    ),
    "splatting": (
        '$a = @(\n "-m", "{M}/a.gguf",\n "--port", "99")\n& ./llama-server @a --temp 0.5',
        {"port": 99, "args": ["--temp", "0.5"]},
    ),
    "launchd and a shell": (
        PLIST.format("<string>sh</string><string>-c</string><string>llama-server -m {M}/a.gguf --port 99</string>"),
        {"port": 99},
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    hub = tmp_path / HUB[1:]
    for folder in (models, hub, hub.parent.parent / "refs"):
        folder.mkdir(parents=True)
    for path in (models / "a.gguf", models / "b.gguf", models / "l1.gguf", hub / "m-Q8_0.gguf", hub / "mmproj-m.gguf"):
        path.touch()
    (hub.parent.parent / "refs" / "main").write_text("abc")
    more = 'MORE="--temp 0.5"'
    (tmp_path / "vars").write_text(
        f"# x\nLLAMA_ARG_MODEL={models}/a.gguf\nPORT=91\n{more}\nGGML_X=3\nLLAMA_API_KEY={KEY}\n"
    )
    (tmp_path / "vars.sh").write_text("N=3\nexport LLAMA_ARG_CTX_SIZE=777\n")
    (tmp_path / ".env").write_text("MODEL=a.gguf\nPORT=95\n")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_is_read_and_the_rest_is_named(kind: str, place: Path) -> None:
    text, expected = KINDS[kind]

    def here(value: Any) -> Any:
        if isinstance(value, list):
            return [here(item) for item in value]
        return value.replace("{M}", f"{place}/models").replace("{S}", str(place)) if isinstance(value, str) else value

    command, *others = parse_commands(here(text).replace("$ROOT", f"{place}/models"), cwd=place)
    assert others == []
    expected = {"gguf": "{M}/a.gguf", "args": [], "env": {}, "notes": [], "has_api_key": False} | expected
    read = {
        **command.settings.model_dump(),
        "args": list(command.own.args),
        "env": command.own.env,
        "gguf": str(command.gguf),
        **{key: getattr(command, key) for key in ("binary", "host", "port", "names", "has_api_key")},
    }
    named = expected.pop("notes")
    assert {key: read[key] for key in expected} == {key: here(value) for key, value in expected.items()}
    assert all(any(words in note for note in command.notes) for words in named), command.notes
    assert len(command.notes) == len(named), command.notes
    assert KEY not in repr(command)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- hosts: all\n  tasks: [{name: run}]\n", "this YAML is not a compose file"),
        ('Start-Process llama-server.exe -ArgumentList "-m a.gguf"', "Start-Process is not read"),
        ('["llama-server", "-m", "a.gguf"]', "no llama-server in the command"),
        ("vllm serve x", "no llama-server in the command"),
    ],
)
def test_what_is_of_no_kind_is_one_line(text: str, line: str) -> None:
    with pytest.raises(BadInput, match=line) as refused:
        parse_commands(text)
    assert "\n" not in str(refused.value)
