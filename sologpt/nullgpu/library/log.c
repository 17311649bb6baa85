// The event log, and the card that the environment describes.

#include "null_gpu.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *file;
static bool tried;
static unsigned long written;  // events so far

void write_event(const char *format, ...) {
    pthread_mutex_lock(&lock);
    if (!tried) {
        const char *path = getenv("NULLGPU_LOG");
        file = path ? fopen(path, "a") : NULL;
        tried = true;
        if (file)
            setvbuf(file, NULL, _IOLBF, 1 << 16);  // so that a crash loses no line
    }
    if (file) {
        va_list arguments;
        va_start(arguments, format);
        vfprintf(file, format, arguments);
        va_end(arguments);
        fputc('\n', file);
    }
    written++;
    pthread_mutex_unlock(&lock);
}

void write_refusal(const char *call, const char *reason) {
    write_event("{\"event\": \"refusal\", \"call\": \"%s\", \"reason\": \"%s\"}", call, reason);
}

// For ../child.py: a line of its own in the same log, and the number of events so far. It calls them through ctypes.
void nullgpu_write(const char *line) {
    write_event("%s", line);
}

unsigned long nullgpu_written(void) {
    return written;
}

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static struct card card;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_card(void) {
    const char *name = getenv("NULLGPU_NAME");
    snprintf(card.name, sizeof card.name, "%s", name ? name : "null GPU");
    long capability = number("NULLGPU_CAPABILITY", 90);
    card.major = capability / 10;
    card.minor = capability % 10;
    card.binary = number("NULLGPU_BINARY", capability);
    card.memory = number("NULLGPU_MEMORY", 80L << 30);
    card.multiprocessors = number("NULLGPU_MULTIPROCESSORS", 132);
    card.threads_per_multiprocessor = number("NULLGPU_THREADS_PER_MULTIPROCESSOR", 2048);
    card.shared_per_multiprocessor = number("NULLGPU_SHARED_PER_MULTIPROCESSOR", 228 << 10);
    card.shared_per_block = number("NULLGPU_SHARED_PER_BLOCK", 227 << 10);
    card.l2_cache = number("NULLGPU_L2_CACHE", 50 << 20);
}

const struct card *the_card(void) {
    pthread_once(&once, read_card);
    return &card;
}
