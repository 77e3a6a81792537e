# Sourced by train.sh and tests/run.sh: activates an environment that has what a requirements file lists.
#
#   use_environment REPOSITORY REQUIREMENTS
#
# Where a virtual or conda environment is active it is used; otherwise REPOSITORY/.venv is made.
# With L2P_SKIP_INSTALL set, the environment at hand is taken as it is (containers, offline machines).

use_environment() {
    local root=$1 lock
    [ -z "${L2P_SKIP_INSTALL:-}" ] || return 0
    if command -v flock >/dev/null && { exec {lock}>"$root/.venv.lock"; } 2>/dev/null; then
        flock -n "$lock" || { echo "Waiting for another job that installs"; flock "$lock"; } # one at a time
        make_environment "$@" || return 1
        exec {lock}>&-
    else
        make_environment "$@"
    fi
}

make_environment() {
    local root=$1 requirements=$2 stamp wanted
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
        if [ ! -x "$root/.venv/bin/python" ]; then
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
                echo "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1)" >&2
                return 1
            }
            echo "Making a virtual environment in $root/.venv"
            python3 -m venv "$root/.venv" || return 1
        fi
        # shellcheck disable=SC1091
        . "$root/.venv/bin/activate"
    fi
    stamp="$(python -c 'import sys; print(sys.prefix)')/.l2p-$(basename "$(dirname "$requirements")")"
    wanted=$(cat "$root/requirements.txt" "$requirements" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $requirements (once; PyTorch is large, this can take minutes)"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements" || return 1
        echo "$wanted" >"$stamp"
    fi
}
