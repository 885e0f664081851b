// SPDX-License-Identifier: BSD-3-Clause
// How the cells of an array are grouped into reductions. Two shapes cover every norm.
#pragma once

#include <cstdint>

namespace nf {

// The cells of one statistic are one contiguous run.
//
//   cell (r, c, s) lies at (r*channels + c)*span + s; its parameter is (r % period)*channels + c
//
//   layer, RMS norm   count = leading axes, channels = normalised cells, span = 1,     period = 1
//   group norm        count = N*G,          channels = C/G,              span = H*W,   period = G
//   instance norm     count = N*C,          channels = 1,                span = H*W,   period = C
struct Rows {
  int64_t count, channels, span, period;
};

// The cells of one statistic lie apart.
//
//   cell (b, o, c, s) lies at ((b*outer + o)*channels + c)*span + s; one statistic per (b, c)
//
//   batch norm        NCHW: 1, N, C, H*W       NHWC: 1, N*H*W, C, 1
//   instance norm     NHWC: N, H*W, C, 1
//   group norm        NHWC: N, H*W, G, C/G
//   layer norm        over C of NCHW: N, C, H*W, 1
//
// Parameters go along the channels: cell (c, s) has parameter (c*span + s) / param_span (batch norm NCHW:
// param_span = H*W; group norm NHWC: 1), or, for a layer norm over a middle axis, along `outer` (param_span = 0).
//
// `any_order`: the cells of a statistic may be added in the order that suits the memory. Only batch norm allows it: the
// other norms promise bits that do not depend on what lies beside a statistic.
struct Columns {
  int64_t batch, outer, channels, span, param_span;
  bool any_order;
};

}  // namespace nf
