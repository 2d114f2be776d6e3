# SPDX-License-Identifier: Apache-2.0
"""`python -m moepress` is `moepress`."""

from moepress.cli import main

main()
