// Kernels: their registration, and their launches through the runtime (torch's own) and the driver (Triton's).

#include "null_gpu.h"

#include <pthread.h>
#include <stdio.h>

enum { MAX_THREADS = 1024, REGISTERS = 65536, MAX_GRID_YZ = 65535 };

// ---- torch's own kernels: functions of the host that stand for them, and their names ----

struct registered {
    const void *function;
    const char *name;
};

static struct registered *table;
static int n_registered, capacity;
static bool sorted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int by_function(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)((const struct registered *)a)->function;
    uintptr_t y = (uintptr_t)((const struct registered *)b)->function;
    return (x > y) - (x < y);
}

static const char *name_of(const void *function) {
    pthread_mutex_lock(&lock);
    if (!sorted)
        qsort(table, n_registered, sizeof *table, by_function);
    sorted = true;
    struct registered key = {function, NULL};
    const struct registered *found = bsearch(&key, table, n_registered, sizeof *table, by_function);
    pthread_mutex_unlock(&lock);
    return found ? found->name : "unknown";
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[2];
    return handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) {
}

void __cudaUnregisterFatBinary(void **handle) {
}

char __cudaInitModule(void **handle) {
    return 1;
}

void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t size,
                       int constant, int global) {
}

void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int limit,
                            uint3 *thread, uint3 *block, dim3 *block_size, dim3 *grid_size, int *warp_size) {
    pthread_mutex_lock(&lock);
    if (n_registered == capacity) {
        capacity = capacity ? 2 * capacity : 1 << 16;
        table = realloc(table, capacity * sizeof *table);
    }
    table[n_registered++] = (struct registered){function, name};
    sorted = false;
    pthread_mutex_unlock(&lock);
}

cudaError_t __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return cudaSuccess;
}

// ---- launches ----

static const char *objection(dim3 grid, dim3 block, size_t shared) {
    unsigned threads = block.x * block.y * block.z;
    if (!threads || threads > MAX_THREADS)
        return "threads of a block";
    if (!grid.x || !grid.y || !grid.z || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ)
        return "size of the grid";
    return shared > (size_t)the_card()->shared_per_block ? "shared memory of a block" : NULL;
}

static void log_launch(const char *kind, const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                       const struct kernel *kernel) {
    write_event("{\"event\": \"launch\", \"kind\": \"%s\", \"name\": \"%s\", \"grid\": [%u, %u, %u], "
                "\"block\": [%u, %u, %u], \"shared\": %zu, \"registers\": %d, \"stack\": %d, \"graph\": %llu}",
                kind, name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
                kernel ? kernel->registers : 0, kernel ? kernel->stack : 0, capture_of(stream));
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    const char *name = name_of(function), *reason = objection(grid, block, shared);
    if (reason) {
        write_refusal(name, reason);
        return runtime_error(cudaErrorInvalidConfiguration);
    }
    log_launch("aten", name, grid, block, shared, stream, NULL);
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                            config->stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    if (!stream_captures(stream))
        function(argument);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *argument, unsigned flags) {
    callback(stream, cudaSuccess, argument);
    return cudaSuccess;
}

// kernel<<<grid, block, shared, stream>>>() puts these four away, and its stub fetches them
static __thread struct configuration {
    dim3 grid, block;
    size_t shared;
    void *stream;
} waiting[16];
static __thread int n_waiting;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    if (n_waiting == 16)
        return 1;
    waiting[n_waiting++] = (struct configuration){grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!n_waiting)
        return runtime_error(cudaErrorInvalidConfiguration);
    struct configuration last = waiting[--n_waiting];
    *grid = last.grid;
    *block = last.block;
    *shared = last.shared;
    *(void **)stream = last.stream;
    return cudaSuccess;
}

// torch's kernels lie in its libraries in a form that is not read here: what is said of them is a plausible guess
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = MAX_THREADS;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = the_card()->binary;
    attributes->maxDynamicSharedSizeBytes = the_card()->shared_per_block;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > the_card()->shared_per_block) {
        write_refusal(name_of(function), "shared memory of a block");
        return runtime_error(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    int by_threads = the_card()->threads_per_multiprocessor / (threads ? threads : 1);
    int by_shared = shared ? the_card()->shared_per_multiprocessor / (int)(shared + 1024) : 32;
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                          size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// ---- Triton's kernels, through the driver: a module is the list of its kernels ----

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    struct kernel *kernels = read_cubin(image);
    *module = kernels ? (CUmodule)kernels : calloc(1, sizeof(struct kernel));
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file)
        return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *image = malloc(size);
    size_t got = fread(image, 1, size, file);
    fclose(file);
    CUresult result = got == (size_t)size ? cuModuleLoadData(module, image) : CUDA_ERROR_INVALID_IMAGE;
    free(image);
    return result;
}

CUresult cuModuleUnload(CUmodule module) {
    return CUDA_SUCCESS;  // the few kilobytes stay, since functions point to them
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    for (struct kernel *kernel = (struct kernel *)module; kernel; kernel = kernel->next)
        if (kernel->name && !strcmp(kernel->name, name)) {
            *function = (CUfunction)kernel;
            return CUDA_SUCCESS;
        }
    struct kernel *unknown = calloc(1, sizeof *unknown);  // not of a cubin: nothing is known about it but the name
    unknown->name = strdup(name);
    *function = (CUfunction)unknown;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    const struct kernel *kernel = (const struct kernel *)function;
    int per_thread = kernel->registers ? REGISTERS / kernel->registers / 32 * 32 : MAX_THREADS;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
        *value = kernel->registers;
        break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        *value = kernel->stack;
        break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
        *value = kernel->static_shared;
        break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = per_thread < MAX_THREADS ? per_thread : MAX_THREADS;
        break;
    default:
        *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    const struct kernel *kernel = (const struct kernel *)function;
    bool too_much = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES &&
                    value + kernel->static_shared > the_card()->shared_per_block;
    if (too_much)
        write_refusal(kernel->name, "shared memory of a block");
    return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
                        void **extra) {
    const struct kernel *kernel = (const struct kernel *)function;
    dim3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    const char *reason = objection(grid, block, shared);
    if (!reason && kernel->registers * block_x * block_y * block_z > REGISTERS)
        reason = "registers of a block";
    if (reason) {
        write_refusal(kernel->name, reason);
        return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    }
    log_launch("triton", kernel->name, grid, block, shared, stream, kernel);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                          config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->hStream, arguments,
                          extra);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void **arguments) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, arguments, NULL);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    return (CUresult)cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = 8;
    return CUDA_SUCCESS;
}
