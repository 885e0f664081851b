# SPDX-License-Identifier: BSD-3-Clause

"""The board for GPUs, and the stages of ``make gpu``."""
