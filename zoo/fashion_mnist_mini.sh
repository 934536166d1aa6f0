#!/usr/bin/env bash
# Fetches all weights of fashion_mnist_mini.
exec solo-ext zoo download --dataset fashion_mnist_mini "$@"
