#!/usr/bin/env bash
# Fetches all weights of imagenet.
exec solo-ext zoo download --dataset imagenet "$@"
