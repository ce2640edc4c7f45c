#!/usr/bin/env bash
# Install the pinned environment on this node, unless it is there: SCRATCH/env/HASH, where HASH is of what is
# pinned and of the Python that it is made from. SCRATCH/activate puts it on the PATH.
#   setup.sh CODE SCRATCH PYTHON
set -euo pipefail
umask 022
code=$1 scratch=$2 python=$3

"$python" "$code/cluster/private.py" folder "$scratch"

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || {
  echo "$(hostname): $python is $("$python" -V 2>&1), and 3.11 or 3.12 is needed: set python in the inventory" >&2
  exit 2
}
hash=$( (cat "$code/constraints.txt" "$code/pyproject.toml"; "$python" -VV) | sha256sum | cut -c1-12)
env=$scratch/env/$hash
mkdir -p "$scratch/env"
exec 9> "$scratch/env/lock"
flock 9  # two set-ups at once would destroy each other's work
if [ ! -e "$env/ready" ]; then
  rm -rf "$env"
  "$python" -m venv "$env"
  "$python" -c '
import sys, tomllib
print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]))
' "$code/pyproject.toml" > "$env/requirements.txt"
  "$env/bin/pip" install --progress-bar off --retries 2 --timeout 15 \
      --constraint "$code/constraints.txt" --requirement "$env/requirements.txt" || {
    echo "error: pip on $(hostname) cannot install what constraints.txt pins (its last lines are in keeper.log): can \
it reach ${PIP_INDEX_URL:-the index that pip is set to there}?\
 Set packages.index or packages.proxy in the inventory" >&2
    exit 3
  }
  sync -f "$env"
  touch "$env/ready"
fi
echo "$hash" > "$scratch/env/current"
# RAY_AUTH_MODE: with token and without it Ray's commands cannot talk, and its default differs between them.
# RAY_TMPDIR, TORCHINDUCTOR_CACHE_DIR: in /tmp others could put code there that runs as us; in SCRATCH nobody.
cat > "$scratch/activate.new" <<ACTIVATE
export PATH=$env/bin:\$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_TMPDIR=$scratch TORCHINDUCTOR_CACHE_DIR=$scratch/torchinductor
ACTIVATE
mv "$scratch/activate.new" "$scratch/activate"
# Ray's own launcher runs plain \`ray\` and \`python\` through ~/.bashrc.
# SCRATCH may be another user's by then.
line="[ -O $scratch -a -O $scratch/activate ] && . $scratch/activate  # asuncion"
[ ! -e ~/.bashrc ] || sed -i --follow-symlinks "\|^\[ -f $scratch/activate \]|d" ~/.bashrc
grep -qsxF "$line" ~/.bashrc || echo "$line" >> ~/.bashrc
