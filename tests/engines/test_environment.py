"""What children inherit, and what engines must not see; pure functions of an environment."""

import os

import pytest

from engines.environment import ROOT, is_loopback, of_child, of_engine, withhold, without_proxies

SECRETS = {
    "OPENAI_API_KEY": "a",
    "HF_TOKEN": "a",
    "AWS_SECRET_ACCESS_KEY": "a",
    "my_password": "a",
    "GOOGLE_APPLICATION_CREDENTIALS": "/a",
    "SWITCHYARD_HOME": "/h",
    "SWITCHYARD_DATABASE_URL": "x",
    "PREFECT_API_URL": "x",
    "NOTIFY_SOCKET": "/run/x",
    "WATCHDOG_PID": "1",
    "WATCHDOG_USEC": "1",
    "DATABASE_URL": "postgresql://joe:hunter2@db/x",
    "HTTPS_PROXY": "http://joe:hunter2@proxy:3128",
    "PLAIN": "sk-abcdefghijklmnopqrstuvwx",
}
NEEDED = {
    "PATH": "/bin",
    "HOME": "/root",
    "LD_LIBRARY_PATH": "/x",
    "CUDA_VISIBLE_DEVICES": "0",
    "HIP_VISIBLE_DEVICES": "0",
    "ROCR_VISIBLE_DEVICES": "0",
    "HSA_OVERRIDE_GFX_VERSION": "10.3.0",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "VK_ICD_FILENAMES": "/x.json",
    "OMP_NUM_THREADS": "4",
    "TOKENIZERS_PARALLELISM": "false",
    "LANG": "C.UTF-8",
    "TMPDIR": "/tmp",
    "XDG_CACHE_HOME": "/c",
    "PYTHONUNBUFFERED": "1",
    "HTTP_PROXY": "http://proxy:3128",
    "NO_PROXY": "example.com",
}


def test_an_engine_sees_what_it_needs_and_no_secret():
    assert of_engine({**SECRETS, **NEEDED}) == NEEDED


def test_the_variable_that_a_plan_names_is_withheld_whatever_it_is_called():
    withhold("NANOBOT_PASSPORT")
    assert of_engine({"NANOBOT_PASSPORT": "x", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize("given", ["", ":", ".", "lib:.", "::/abs", "/abs:", "/abs:../x:"])
def test_nothing_relative_is_on_the_path_of_a_child(given):
    """An empty entry is the working directory, in spite of PYTHONSAFEPATH."""
    env = of_child({"PYTHONPATH": given})
    entries = env["PYTHONPATH"].split(os.pathsep)
    assert env["PYTHONSAFEPATH"] == "1"
    assert all(map(os.path.isabs, entries))
    assert entries == [str(ROOT), *(["/abs"] if "/abs" in given else [])]


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "example.com, .corp"}, "example.com,.corp,127.0.0.1,localhost,::1"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, "a,127.0.0.1,localhost,::1"),
        ({"no_proxy": "", "NO_PROXY": "b"}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "localhost"}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_loopback_is_never_proxied_and_what_the_user_named_stays(given, hosts):
    env = of_child(given)
    assert env["NO_PROXY"] == env["no_proxy"] == hosts
    assert of_child(env) == env


def test_every_spelling_of_a_proxy():
    spelled = {name: "x" for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")}
    assert without_proxies({**spelled, "NO_PROXY": "a", "PATH": "/bin"}) == {"NO_PROXY": "a", "PATH": "/bin"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.3", "localhost", "::1", "[::1]"])
def test_loopback(host):
    assert is_loopback(host)
    assert not is_loopback(host.replace("127", "10").replace("localhost", "box").replace("::1", "fd00::1"))
