#!/usr/bin/env bash
exec solo-ext linear --config-path "$(dirname "$0")" --config-name res_ressl.yaml "$@"
