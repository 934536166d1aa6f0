#!/usr/bin/env bash
exec solo-ext pretrain --config-path "$(dirname "$0")" --config-name mocov3.yaml "$@"
