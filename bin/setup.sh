# Sourced by the scripts beside it: caravan_setup EXTRA makes or refreshes the virtual environment.
venv=${CARAVAN_VENV:-$here/.venv}

caravan_python() {
  local name
  for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    [ -n "$name" ] || continue
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; raise SystemExit(not sys.version_info[:2] >= (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or newer was found; install one or set PYTHON=/path/to/python" >&2
  return 2
}

caravan_setup() {
  local extra=$1 want stamp python
  want=$(cat "$here/pyproject.toml" "$here/bin/setup.sh" | cksum)
  stamp="$venv/.caravan-ready-${extra:-core}"
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && return 0
  python=$(caravan_python) || exit 2
  echo "setting up $venv (once; a few minutes) ..."
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # torch first and pinned: left to itself the resolver may choose a newer build with gigabytes of CUDA.
  if ! "$venv/bin/python" -c 'import torch' >/dev/null 2>&1; then
    if [ -n "${CARAVAN_TORCH_INDEX:-}" ]; then
      "$venv/bin/python" -m pip install -q --disable-pip-version-check --index-url "$CARAVAN_TORCH_INDEX" torch==2.13.0
    else
      "$venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
    fi
  fi
  "$venv/bin/python" -m pip install -q --disable-pip-version-check -e "$here${extra:+[$extra]}"
  echo "$want" >"$stamp"
}
