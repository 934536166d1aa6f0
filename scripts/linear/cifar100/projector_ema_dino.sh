#!/usr/bin/env bash
exec solo-ext linear --config-path "$(dirname "$0")" --config-name projector_ema_dino.yaml "$@"
