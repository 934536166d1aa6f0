#!/usr/bin/env bash
# Fetches all weights of cifar100.
exec solo-ext zoo download --dataset cifar100 "$@"
