#!/usr/bin/env bash
# Fetches all weights of imagenet100.
exec solo-ext zoo download --dataset imagenet100 "$@"
