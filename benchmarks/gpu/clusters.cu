// SPDX-License-Identifier: BSD-3-Clause
// How many clusters a device holds at once: a line for each shape of a launch, blocks, threads, KiB of shared memory in
// each block, clusters. The kernel needs next to no registers: it is the room for shared memory, and how whole clusters
// fit into the parts of the chip, that shows.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void nothing() {}

int main() {
  for (const int blocks : {1, 2, 4, 8})
    for (const int threads : {128, 256})
      for (const int kib : {16, 32, 96, 225}) {
        cudaLaunchAttribute cluster{};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = unsigned(blocks), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(blocks) * 4096);
        config.blockDim = dim3(unsigned(threads));
        config.dynamicSmemBytes = size_t(kib) << 10;
        config.attrs = &cluster, config.numAttrs = 1;
        int clusters = 0;
        cudaError_t error = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, kib << 10);
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, nothing, &config);
        if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
          std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
          return 1;
        }
        if (error != cudaSuccess) cudaGetLastError();  // more than this device has
        std::printf("%d %d %d %d\n", blocks, threads, kib, error == cudaSuccess ? clusters : 0);
      }
}
