// What the files of the null GPU share: a library that stands in for the CUDA runtime, the driver and cuBLAS.
// Memory is reserved and never computed on. Everything that a program asks of the device is written to a log.
// The log's events and their fields are described in ../events.py.

#ifndef NULL_GPU_H
#define NULL_GPU_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

// The card, read once from the environment variables NULLGPU_*.
struct card {
    char name[256];
    int major, minor;  // compute capability
    int binary;  // 10 x the compute capability that torch's own kernels are compiled for, of those that the card runs
    size_t memory;  // bytes
    int multiprocessors;
    int threads_per_multiprocessor;
    int shared_per_multiprocessor, shared_per_block;  // bytes; per block: the most that a kernel may ask for
    int l2_cache;  // bytes
};
const struct card *the_card(void);

// log.c
void write_event(const char *format, ...) __attribute__((format(printf, 1, 2)));  // one JSON object, without newline
void write_refusal(const char *call, const char *reason);

// device.c
cudaError_t runtime_error(cudaError_t error);  // also remembers it for cudaGetLastError(); success is not remembered

// memory.c
bool is_device_memory(const void *pointer);
bool is_pinned_memory(const void *pointer);

// streams.c
bool stream_captures(cudaStream_t stream);
unsigned long long capture_of(cudaStream_t stream);  // 0: none
cudaError_t refuse_during_capture(const char *call);  // invalidates the capture
bool unsafe_calls_are_forbidden(void);  // a capture is going on that does not allow them in this thread

// cubin.c
struct kernel {
    char *name;
    int registers;  // per thread
    int stack;  // bytes of local memory per thread: spilled registers, and arrays with computed indices
    int static_shared;  // bytes
    struct kernel *next;
};
struct kernel *read_cubin(const void *image);  // the kernels of a cubin; NULL if the image is none

#endif
