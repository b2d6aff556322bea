# Makes .venv with reft installed in it; sourced by quickstart.sh and test.sh: `environment ".[dev]"`.
# PyTorch comes first, so that nothing else chooses its build: the newest with CUDA where there is an NVIDIA GPU,
# elsewhere the release the tests were written with. Set REFT_TORCH (a pip requirement) to choose another.

environment() {
    local requirement=$1 python=${PYTHON:-python3} torch=${REFT_TORCH:-torch==2.13.0}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "reft needs Python 3.11 or newer, $python is $("$python" --version 2>&1); set PYTHON=/path/to/python3" >&2
        return 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    local pip=".venv/bin/python -m pip --disable-pip-version-check --quiet"
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if nvidia-smi >/dev/null 2>&1; then torch=${REFT_TORCH:-torch>=2.10}; fi
        $pip install "$torch"
    fi
    $pip install --editable "$requirement"
}
