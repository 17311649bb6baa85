// Memory: reserved in the address space of the process, and not touched where that can be avoided. So a card of 80 GB
// fits on a small machine. Reading it gives zeros, or the small things that were copied there.

#include "null_gpu.h"

#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>

enum kind { PAGEABLE, PINNED, DEVICE, ADDRESSES };  // ADDRESSES: of the device, without memory behind them so far

struct block {
    char *start;
    size_t size;
    enum kind kind;
};

static struct block *blocks;
static int n_blocks, capacity;
static size_t used;  // bytes of the card
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool take(size_t size) {
    pthread_mutex_lock(&lock);
    bool fits = used + size <= the_card()->memory;
    if (fits)
        used += size;
    pthread_mutex_unlock(&lock);
    return fits;
}

static void give_back(size_t size) {
    pthread_mutex_lock(&lock);
    used -= size;
    pthread_mutex_unlock(&lock);
}

static void *reserve(size_t size, enum kind kind) {
    size_t whole = (size + 4095) & ~(size_t)4095;
    void *start = mmap(NULL, whole ? whole : 4096, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    pthread_mutex_lock(&lock);
    if (n_blocks == capacity) {
        capacity = capacity ? 2 * capacity : 1024;
        blocks = realloc(blocks, capacity * sizeof *blocks);
    }
    blocks[n_blocks++] = (struct block){start, whole ? whole : 4096, kind};
    pthread_mutex_unlock(&lock);
    return start;
}

// The size of the block that starts at `start`, which is gone afterwards; 0: there is none.
static size_t release(void *start) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_blocks && !size; i++)
        if (blocks[i].start == start) {
            size = blocks[i].size;
            blocks[i] = blocks[--n_blocks];
        }
    pthread_mutex_unlock(&lock);
    if (size)
        munmap(start, size);
    return size;
}

static enum kind kind_of(const void *pointer) {
    enum kind kind = PAGEABLE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_blocks && kind == PAGEABLE; i++)
        if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size)
            kind = blocks[i].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

bool is_device_memory(const void *pointer) {
    return kind_of(pointer) >= DEVICE;
}

bool is_pinned_memory(const void *pointer) {
    return kind_of(pointer) == PINNED;
}

// ---- allocation ----

static cudaError_t allocate(void **pointer, size_t size, const char *call) {
    if (unsafe_calls_are_forbidden())
        return refuse_during_capture(call);
    bool fits = take((size + 4095) & ~(size_t)4095);
    *pointer = fits ? reserve(size, DEVICE) : NULL;
    write_event("{\"event\": \"malloc\", \"bytes\": %zu, \"granted\": %s}", size, fits ? "true" : "false");
    return *pointer ? cudaSuccess : runtime_error(cudaErrorMemoryAllocation);
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
    return allocate(pointer, size, "cudaMalloc");
}

cudaError_t cudaFree(void *pointer) {
    size_t size = release(pointer);
    if (pointer && !size)
        return runtime_error(cudaErrorInvalidValue);
    if (size) {
        give_back(size);
        write_event("{\"event\": \"free\", \"bytes\": %zu}", size);
    }
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    if (unsafe_calls_are_forbidden())
        return refuse_during_capture("cudaHostAlloc");
    *pointer = reserve(size, PINNED);
    return *pointer ? cudaSuccess : runtime_error(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void *pointer) {
    release(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = the_card()->memory;
    *available = *total - used;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    enum kind kind = kind_of(pointer);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = kind == PAGEABLE ? cudaMemoryTypeUnregistered
                     : kind == PINNED   ? cudaMemoryTypeHost
                                        : cudaMemoryTypeDevice;
    attributes->devicePointer = kind == PAGEABLE ? NULL : (void *)pointer;
    attributes->hostPointer = kind >= DEVICE ? NULL : (void *)pointer;
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    *pointer = reserve(4096, DEVICE);
    return cudaSuccess;
}

// ---- virtual memory: addresses and memory apart, which torch calls expandable segments ----

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags option) {
    *granularity = 2 << 20;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t size, size_t alignment, CUdeviceptr wanted,
                             unsigned long long flags) {
    *pointer = (CUdeviceptr)reserve(size, ADDRESSES);
    return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
    release((void *)pointer);
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties,
                     unsigned long long flags) {
    bool fits = take(size);
    write_event("{\"event\": \"malloc\", \"bytes\": %zu, \"granted\": %s}", size, fits ? "true" : "false");
    *handle = size;  // all that cuMemRelease() has to know
    return fits ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    give_back(handle);
    write_event("{\"event\": \"free\", \"bytes\": %zu}", (size_t)handle);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc *access, size_t count) {
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (!is_device_memory((void *)pointer))
        return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

// ---- copies ----

static const char *direction(const void *to, const void *from) {
    static const char *names[2][2] = {{"host_to_host", "device_to_host"}, {"host_to_device", "device_to_device"}};
    return names[is_device_memory(to)][is_device_memory(from)];
}

// Small things are really copied, because programs read them back. Large ones would fill the memory of the machine.
static void copy(void *to, const void *from, size_t size) {
    bool from_device = is_device_memory(from);
    size_t most = !is_device_memory(to) ? SIZE_MAX : from_device ? 1 << 16 : 1 << 20;
    if (size <= most)
        memmove(to, from, size);
}

static cudaError_t log_and_copy(void *to, const void *from, size_t size, bool is_async, cudaStream_t stream) {
    bool to_device = is_device_memory(to), from_device = is_device_memory(from);
    bool pinned = (to_device || is_pinned_memory(to)) && (from_device || is_pinned_memory(from));
    if (is_async && stream_captures(stream) && !pinned)
        return refuse_during_capture("cudaMemcpyAsync with pageable memory");
    write_event("{\"event\": \"memcpy\", \"bytes\": %zu, \"direction\": \"%s\", \"is_async\": %s, \"pinned\": %s}",
                size, direction(to, from), is_async ? "true" : "false", pinned ? "true" : "false");
    copy(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (unsafe_calls_are_forbidden())
        return refuse_during_capture("cudaMemcpy");
    return log_and_copy(to, from, size, false, 0);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return log_and_copy(to, from, size, true, stream);
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    write_event("{\"event\": \"memcpy\", \"bytes\": %zu, \"direction\": \"%s\", \"is_async\": true, \"pinned\": true}",
                width * height, direction(to, from));
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    write_event("{\"event\": \"memset\", \"bytes\": %zu}", size);
    if (size <= 1 << 20)
        memset(to, value, size);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t size) {
    return cudaMemsetAsync(to, value, size, 0);
}
