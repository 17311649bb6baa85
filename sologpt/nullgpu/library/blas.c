// cuBLAS and cuBLASLt: matmuls are logged with their layout, shape and types. What the real ones refuse is refused.
//
// The matrices are in column-major order, as cuBLAS has them: D (m, n) = op(A) (m, k) @ op(B) (k, n). The layout "TN"
// says that A is transposed and B is not. A product of row-major matrices has its operands exchanged.

#include "null_gpu.h"

// cublas_api.h includes these two for the names of their types; they need headers of C++ that are not always installed
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
typedef struct { uint16_t bits; } __half, __nv_bfloat16;

#include <cublasLt.h>
#include <cublas_v2.h>

struct cublasContext {
    cublasMath_t math;
};

struct cublasLtContext {
    int unused;
};

// the first of these is what the library's own types hold, which nobody else looks into
struct layout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t leading_dimension;
    int32_t batch;
};

struct description {
    cublasOperation_t a, b;
    cublasComputeType_t compute;
    cudaDataType scale;  // of alpha and beta
    int32_t a_scale, b_scale;  // cublasLtMatmulMatrixScale_t
};

static struct layout *layout_of(cublasLtMatrixLayout_t layout) {
    return (struct layout *)layout;
}

static struct description *description_of(cublasLtMatmulDesc_t description) {
    return (struct description *)description;
}

// ---- what is written, and what is refused ----

static const char *type_name(cudaDataType type) {
    switch ((int)type) {
    case CUDA_R_64F:
        return "float64";
    case CUDA_R_32F:
        return "float32";
    case CUDA_R_16F:
        return "float16";
    case CUDA_R_16BF:
        return "bfloat16";
    case CUDA_R_8F_E4M3:
        return "float8_e4m3fn";
    case CUDA_R_8F_E5M2:
        return "float8_e5m2";
    case CUDA_R_4F_E2M1:
        return "float4_e2m1fn";
    case CUDA_R_8I:
        return "int8";
    case CUDA_R_32I:
        return "int32";
    default:
        return "other";
    }
}

struct gemm {
    cublasOperation_t a, b;
    uint64_t m, n, k;
    int batch;
    cudaDataType type_a, type_b, type_d;
    bool tf32;
    bool accumulates;  // the product is added to what is there
};

static bool is_zero(const void *beta, cudaDataType scale) {
    static const char zeros[8];
    return !memcmp(beta, zeros, scale == CUDA_R_64F ? 8 : scale == CUDA_R_16F ? 2 : 4);
}

static void write_gemm(struct gemm g, const char *refused) {
    write_event("{\"event\": \"gemm\", \"layout\": \"%c%c\", \"m\": %lu, \"n\": %lu, \"k\": %lu, \"batch\": %d, "
                "\"a\": \"%s\", \"b\": \"%s\", \"d\": \"%s\", \"tf32\": %s, \"accumulates\": %s, \"refused\": \"%s\"}",
                "NTC"[g.a], "NTC"[g.b], g.m, g.n, g.k, g.batch, type_name(g.type_a), type_name(g.type_b),
                type_name(g.type_d), g.tf32 ? "true" : "false", g.accumulates ? "true" : "false",
                refused ? refused : "");
}

static bool is_float8(cudaDataType type) {
    return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2;
}

// Why cuBLASLt does not have this product on this card; NULL: it does. From the tables of cublasLtMatmul() in
// https://docs.nvidia.com/cuda/cublas: 8-bit products are TN alone, except for float8 on compute capability 10.
static const char *objection(const struct description *d, const struct layout *a) {
    int capability = 10 * the_card()->major + the_card()->minor;
    bool tn = d->a == CUBLAS_OP_T && d->b == CUBLAS_OP_N;
    if (a->type == CUDA_R_8I)
        return tn ? NULL : "int8 that is not TN";
    if (!is_float8(a->type) && a->type != CUDA_R_4F_E2M1)
        return NULL;
    if (capability < 89)
        return "float8 before compute capability 8.9";
    if (!tn && the_card()->major != 10)
        return "float8 that is not TN";
    bool by_block = d->a_scale == CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3 ||
                    d->a_scale == CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0;
    if ((by_block || a->type == CUDA_R_4F_E2M1) && capability < 100)
        return "scales of 16 or 32 elements before compute capability 10.0";
    bool by_row = d->a_scale == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F ||
                  d->a_scale == CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F ||
                  d->a_scale == CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
    return by_row && capability != 90 ? "scales of rows or blocks, other than on compute capability 9.0" : NULL;
}

// ---- cuBLAS ----

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = calloc(1, sizeof **handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t size) {
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    handle->math = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = handle->math;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetSmCountTarget(cublasHandle_t handle, int multiprocessors) {
    return CUBLAS_STATUS_SUCCESS;
}

// the low bits say how it computes; a flag above them limits how partial sums are added
static bool uses_tf32(cublasHandle_t handle) {
    return (handle->math & 0xf) == CUBLAS_TF32_TENSOR_OP_MATH;
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType type_a, int lda,
                                          long long stride_a, const void *b, cudaDataType type_b, int ldb,
                                          long long stride_b, const void *beta, void *d, cudaDataType type_d, int ldd,
                                          long long stride_d, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t algorithm) {
    bool tf32 = type_a == CUDA_R_32F && (uses_tf32(handle) || compute == CUBLAS_COMPUTE_32F_FAST_TF32);
    cudaDataType scale = compute == CUBLAS_COMPUTE_16F   ? CUDA_R_16F
                       : compute == CUBLAS_COMPUTE_64F ? CUDA_R_64F
                                                         : CUDA_R_32F;
    write_gemm((struct gemm){op_a, op_b, m, n, k, batch, type_a, type_b, type_d, tf32, !is_zero(beta, scale)}, NULL);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType type_a, int lda, const void *b,
                            cudaDataType type_b, int ldb, const void *beta, void *d, cudaDataType type_d, int ldd,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, d,
                                      type_d, ldd, 0, 1, compute, algorithm);
}

cublasStatus_t cublasSgemmEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                             const float *alpha, const void *a, cudaDataType type_a, int lda, const void *b,
                             cudaDataType type_b, int ldb, const float *beta, void *d, cudaDataType type_d, int ldd) {
    return cublasGemmEx(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, b, type_b, ldb, beta, d, type_d, ldd,
                        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n,
                              int k, const float *alpha, const float *a, int lda, const float *b, int ldb,
                              const float *beta, float *d, int ldd) {
    return cublasSgemmEx(handle, op_a, op_b, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, d,
                         CUDA_R_32F, ldd);
}

cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                         int n, int k, const float *alpha, const float *a, int lda, long long stride_a,
                                         const float *b, int ldb, long long stride_b, const float *beta, float *d,
                                         int ldd, long long stride_d, int batch) {
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, CUDA_R_32F, lda, stride_a, b, CUDA_R_32F,
                                      ldb, stride_b, beta, d, CUDA_R_32F, ldd, stride_d, batch, CUBLAS_COMPUTE_32F,
                                      CUBLAS_GEMM_DEFAULT);
}

// a product with a vector: torch has it for matrices of one column
cublasStatus_t cublasSgemv_v2(cublasHandle_t handle, cublasOperation_t op_a, int rows, int columns, const float *alpha,
                              const float *a, int lda, const float *x, int step_x, const float *beta, float *y,
                              int step_y) {
    bool transposed = op_a != CUBLAS_OP_N;
    return cublasSgemm_v2(handle, op_a, CUBLAS_OP_N, transposed ? columns : rows, 1, transposed ? rows : columns, alpha,
                          a, lda, x, 1, beta, y, 1);
}

// ---- cuBLASLt ----

size_t cublasLtGetVersion(void) {
    return CUBLAS_VERSION;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading_dimension) {
    struct layout *made = calloc(1, sizeof *made);
    *made = (struct layout){type, rows, columns, leading_dimension, 1};
    *layout = (cublasLtMatrixLayout_t)made;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void *value,
                                                size_t size) {
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT)
        memcpy(&layout_of(layout)->batch, value, sizeof(int32_t));
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *description, cublasComputeType_t compute,
                                        cudaDataType scale) {
    struct description *made = calloc(1, sizeof *made);
    made->compute = compute;
    made->scale = scale;
    *description = (cublasLtMatmulDesc_t)made;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    free(description);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t attribute, const void *value,
                                              size_t size) {
    struct description *d = description_of(description);
    void *field = attribute == CUBLASLT_MATMUL_DESC_TRANSA       ? (void *)&d->a
                : attribute == CUBLASLT_MATMUL_DESC_TRANSB       ? (void *)&d->b
                : attribute == CUBLASLT_MATMUL_DESC_A_SCALE_MODE ? (void *)&d->a_scale
                : attribute == CUBLASLT_MATMUL_DESC_B_SCALE_MODE ? (void *)&d->b_scale
                                                                 : NULL;
    if (field)
        memcpy(field, value, sizeof(int32_t));
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    *preference = calloc(1, sizeof **preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t size) {
    return CUBLAS_STATUS_SUCCESS;
}

static void write_lt_gemm(cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t left, cublasLtMatrixLayout_t right,
                          cublasLtMatrixLayout_t result, bool accumulates, const char *refused) {
    const struct description *d = description_of(description);
    const struct layout *a = layout_of(left), *b = layout_of(right), *made = layout_of(result);
    uint64_t k = d->a == CUBLAS_OP_N ? a->columns : a->rows;
    bool tf32 = d->compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    write_gemm((struct gemm){d->a, d->b, made->rows, made->columns, k, a->batch, a->type, b->type, made->type, tf32,
                             accumulates}, refused);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *found) {
    const char *refused = objection(description_of(description), layout_of(a));
    *found = refused ? 0 : 1;
    if (refused) {
        write_lt_gemm(description, a, b, d, false, refused);
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    memset(results, 0, sizeof *results);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void *alpha,
                              const void *A, cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b,
                              const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D,
                              cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                              size_t workspace_size, cudaStream_t stream) {
    const char *refused = objection(description_of(description), layout_of(a));
    write_lt_gemm(description, a, b, d, !is_zero(beta, description_of(description)->scale), refused);
    return refused ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
}
