// SPDX-License-Identifier: BSD-3-Clause
// A device that is the host's memory, with a log of what was asked of it.
#pragma once

#include "cuda/device.h"

namespace nf::cuda {

void note_launch(const char* kernel, Stream stream);
// Is this workspace of so many bytes, aligned to 256? It is spoiled, as a kernel would.
bool is_workspace(void* p, size_t bytes);

}  // namespace nf::cuda
