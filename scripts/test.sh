#!/usr/bin/env bash
# Installs what the tests need into .venv, then runs the gate (scripts/check). Extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment ".[dev]"
exec bash scripts/check "$@"
