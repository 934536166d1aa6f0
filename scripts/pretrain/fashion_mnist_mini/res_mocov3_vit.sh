#!/usr/bin/env bash
exec solo-ext pretrain --config-path "$(dirname "$0")" --config-name res_mocov3_vit.yaml "$@"
