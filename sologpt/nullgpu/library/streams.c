// Streams, events, synchronisation, and the capture of graphs with what CUDA forbids meanwhile.

#include "null_gpu.h"

#include <pthread.h>

struct CUstream_st {
    unsigned long long capture;  // the capture that this stream takes part in, or took part in
    int priority;
};

struct CUevent_st {
    unsigned long long capture;  // that it was recorded in; 0: none
};

// ---- capture: one at a time ----

static struct {
    unsigned long long id;  // 0: none is going on
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    bool invalid;
} capture;
static unsigned long long n_captures;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

unsigned long long capture_of(cudaStream_t stream) {
    bool is_default = (uintptr_t)stream <= 2;  // the legacy and the per-thread stream have small numbers as handles
    return !is_default && capture.id && stream->capture == capture.id ? capture.id : 0;
}

bool stream_captures(cudaStream_t stream) {
    return capture_of(stream) != 0;
}

// As the description of cudaThreadExchangeStreamCaptureMode() has it.
bool unsafe_calls_are_forbidden(void) {
    if (!capture.id || thread_mode == cudaStreamCaptureModeRelaxed)
        return false;
    bool own = pthread_equal(capture.thread, pthread_self());
    if (own)
        return capture.mode != cudaStreamCaptureModeRelaxed;
    return thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
}

cudaError_t refuse_during_capture(const char *call) {
    write_refusal(call, "a stream is being captured");
    capture.invalid = true;
    return runtime_error(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode former = thread_mode;
    thread_mode = *mode;
    *mode = former;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if ((uintptr_t)stream <= 2 || capture.id)
        return refuse_during_capture("cudaStreamBeginCapture");
    capture.id = stream->capture = ++n_captures;
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.invalid = false;
    write_event("{\"event\": \"capture\", \"begins\": true, \"graph\": %llu}", capture.id);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!stream_captures(stream))
        return runtime_error(cudaErrorIllegalState);
    write_event("{\"event\": \"capture\", \"begins\": false, \"graph\": %llu}", capture.id);
    *graph = capture.invalid ? NULL : (cudaGraph_t)(uintptr_t)capture.id;
    capture.id = 0;
    return capture.invalid ? runtime_error(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = !stream_captures(stream) ? cudaStreamCaptureStatusNone
            : capture.invalid          ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *n_dependencies) {
    if (id)
        *id = capture_of(stream);
    if (graph)
        *graph = (cudaGraph_t)(uintptr_t)capture_of(stream);
    if (n_dependencies)
        *n_dependencies = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) {
    *n = 1;  // torch warns of a graph without nodes; it does not look into them
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    *exec = (cudaGraphExec_t)graph;  // both are the number of the capture
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    write_event("{\"event\": \"graph_launch\", \"graph\": %llu}", (unsigned long long)(uintptr_t)exec);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    return cudaSuccess;
}

// ---- streams ----

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = calloc(1, sizeof **stream);
    (*stream)->priority = priority;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = (uintptr_t)stream <= 2 ? 0 : stream->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream_captures(stream) ? refuse_during_capture("cudaStreamQuery") : cudaSuccess;
}

// Work that is captured in one stream, and waited for in another, makes that one take part in the capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    if (capture.id && event->capture == capture.id && (uintptr_t)stream > 2)
        stream->capture = capture.id;
    return cudaSuccess;
}

// ---- events: all work is done at once, and takes a millisecond ----

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, 0);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    event->capture = capture_of(stream);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    return unsafe_calls_are_forbidden() ? refuse_during_capture("cudaEventQuery") : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1.0f;
    return cudaSuccess;
}

// ---- synchronisation ----

static cudaError_t wait(const char *what, bool of_capture, const char *call) {
    if (of_capture)
        return refuse_during_capture(call);
    write_event("{\"event\": \"sync\", \"what\": \"%s\"}", what);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    return wait("device", capture.id != 0, "cudaDeviceSynchronize");
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return wait("stream", stream_captures(stream), "cudaStreamSynchronize");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return wait("event", capture.id && event->capture == capture.id, "cudaEventSynchronize");
}
