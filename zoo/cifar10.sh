#!/usr/bin/env bash
# Fetches all weights of cifar10.
exec solo-ext zoo download --dataset cifar10 "$@"
