#!/bin/sh
# Generate the Python stubs beside the protos. The stubs are committed; `make check` fails when they drift.
# The stubs are made with grpcio-tools 1.76: older stubs run on newer runtimes, not the other way round.
set -eu
cd "$(dirname "$0")"
out=${1:-.}
"${PYTHON:-python3}" -m grpc_tools.protoc -I. --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" \
    --mypy_grpc_out="$out" modularforge/v1/fleet.proto modularforge/v1/admin.proto
