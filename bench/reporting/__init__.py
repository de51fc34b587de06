# SPDX-License-Identifier: MIT
"""Turns the JSON of the benches into one page; see ../report.py."""
