#!/usr/bin/env bash
# Fetches all weights of fashion_mnist.
exec solo-ext zoo download --dataset fashion_mnist "$@"
