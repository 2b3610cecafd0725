// Found before CUDA's own header of this name: see harness/simt.h.
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#undef __cluster_dims__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

#include "../harness/simt.h"
#include "../harness/device.h"
#include "../harness/runtime.h"
