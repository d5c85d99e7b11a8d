#!/usr/bin/env bash
# The CUDA 13.0 compiler for the x86-64 wheels, inside manylinux_2_28 (AlmaLinux 8). Other wheels have no GPU code.
set -euo pipefail
[ "$(uname -m)" = x86_64 ] || exit 0
dnf -y -q config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf -y -q install cuda-nvcc-13-0 cuda-cudart-devel-13-0
/usr/local/cuda-13.0/bin/nvcc --version
