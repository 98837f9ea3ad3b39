/* Python's door to _native_kernels: checks every argument, then computes without the GIL.
 *
 * Limited API of Python 3.11: one binary serves 3.11 and everything after it. All arguments are
 * positional; holdfast.coding.native gives them names. Every buffer is held (Py_buffer) until the
 * call returns, so no other thread can free or resize it meanwhile.
 */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <string.h>

#include "_native_kernels.h"

/* Below this many bytes, giving up the GIL costs more than it lets others do. */
#define KEEP_GIL_BYTES 32768

struct state {
    PyObject *error; /* holdfast.coding.errors.BufferMismatchError */
};

/* Buffers of one call, and plain pointers to them for the kernel. */
struct buffers {
    Py_buffer *views;
    uint8_t **pointers;
    Py_ssize_t count; /* of views that must be released */
};

struct call {
    uint8_t *coefficients; /* own copy, row-major: the matrix may have any strides */
    Py_ssize_t rows, columns;
    struct buffers sources, destinations;
    Py_ssize_t chunk_bytes; /* -1: no buffer seen yet */
};

static PyObject *refuse(PyObject *module)
{
    return ((struct state *)PyModule_GetState(module))->error;
}

static const struct hf_level *level_of(PyObject *module, PyObject *index_object)
{
    long index = PyLong_AsLong(index_object);
    if (index == -1 && PyErr_Occurred())
        return NULL;
    if (index < 0 || (size_t)index >= hf_level_count) {
        PyErr_Format(refuse(module), "level index must be in 0..%zd, got %ld",
                     (Py_ssize_t)hf_level_count - 1, index);
        return NULL;
    }
    if (!hf_levels[index].usable()) {
        PyErr_Format(refuse(module), "this processor cannot run level %s; name another",
                     hf_levels[index].name);
        return NULL;
    }
    return &hf_levels[index];
}

/* ---- taking and checking buffers ----------------------------------------------------------- */

static int take_one(PyObject *module, PyObject *object, const char *role, Py_ssize_t index,
                    Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_FULL_RO)) {
        PyErr_Clear();
        PyErr_Format(refuse(module), "%s %zd must be a buffer of bytes, got %R", role, index,
                     (PyObject *)Py_TYPE(object));
        return -1;
    }
    if (!PyBuffer_IsContiguous(view, 'C')) {
        PyBuffer_Release(view);
        PyErr_Format(refuse(module),
                     "%s %zd must be C-contiguous; pass a contiguous view or a copy", role, index);
        return -1;
    }
    return 0;
}

/* All buffers of one role; the length of the very first one is what all others must have. */
static int take_all(PyObject *module, PyObject *tuple, const char *role, int writable,
                    struct call *call, struct buffers *out)
{
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count > HF_MAX_CODE_LENGTH) {
        PyErr_Format(refuse(module), "at most %d %ss, got %zd", HF_MAX_CODE_LENGTH, role, count);
        return -1;
    }
    out->views = PyMem_Calloc((size_t)count + 1, sizeof *out->views);
    out->pointers = PyMem_Calloc((size_t)count + 1, sizeof *out->pointers);
    if (!out->views || !out->pointers) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_buffer *view = &out->views[i];
        if (take_one(module, PyTuple_GetItem(tuple, i), role, i, view))
            return -1;
        out->count = i + 1;
        out->pointers[i] = view->buf;
        if (call->chunk_bytes < 0)
            call->chunk_bytes = view->len;
        if (view->len != call->chunk_bytes) {
            PyErr_Format(refuse(module),
                         "all buffers must have the same length: the first has %zd bytes, "
                         "%s %zd has %zd",
                         call->chunk_bytes, role, i, view->len);
            return -1;
        }
        if (writable && view->readonly) {
            PyErr_Format(refuse(module),
                         "%s %zd (%zd bytes) is read-only; pass writable memory", role, i,
                         view->len);
            return -1;
        }
    }
    return 0;
}

/* Columns of a matrix, or its transpose, are as good as the whole: copied, whatever the strides. */
static int copy_coefficients(PyObject *module, const Py_buffer *view, struct call *call)
{
    if (view->ndim != 2 || view->itemsize != 1 || (view->format && strcmp(view->format, "B"))) {
        PyErr_Format(refuse(module),
                     "coefficients must be a 2-dimensional array of uint8, got %d dimensions of "
                     "format %s",
                     view->ndim, view->format ? view->format : "B");
        return -1;
    }
    call->rows = view->shape[0];
    call->columns = view->shape[1];
    if (call->rows > HF_MAX_CODE_LENGTH || call->columns > HF_MAX_CODE_LENGTH) {
        PyErr_Format(refuse(module), "at most %d sources and destinations, got %zd and %zd",
                     HF_MAX_CODE_LENGTH, call->columns, call->rows);
        return -1;
    }
    call->coefficients = PyMem_Malloc((size_t)(call->rows * call->columns) + 1);
    if (!call->coefficients) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t r = 0; r < call->rows; r++)
        for (Py_ssize_t c = 0; c < call->columns; c++)
            call->coefficients[r * call->columns + c] =
                ((const uint8_t *)view->buf)[r * view->strides[0] + c * view->strides[1]];
    return 0;
}

static int take_coefficients(PyObject *module, PyObject *object, struct call *call)
{
    Py_buffer view;
    int failed;
    if (PyObject_GetBuffer(object, &view, PyBUF_STRIDED_RO | PyBUF_FORMAT)) {
        PyErr_Clear();
        PyErr_Format(refuse(module), "coefficients must be a 2-dimensional array of uint8, got %R",
                     (PyObject *)Py_TYPE(object));
        return -1;
    }
    failed = copy_coefficients(module, &view, call);
    PyBuffer_Release(&view);
    return failed;
}

static int check_counts(PyObject *module, const struct call *call)
{
    if (call->rows == call->destinations.count && call->columns == call->sources.count)
        return 0;
    PyErr_Format(refuse(module),
                 "coefficients of shape (%zd, %zd) need %zd destinations and %zd sources, got %zd "
                 "and %zd",
                 call->rows, call->columns, call->rows, call->columns, call->destinations.count,
                 call->sources.count);
    return -1;
}

static int overlap(PyObject *module, const struct call *call, Py_ssize_t destination,
                   const char *role, Py_ssize_t index, const uint8_t *other)
{
    uintptr_t left = (uintptr_t)call->destinations.pointers[destination], right = (uintptr_t)other;
    uintptr_t distance = left < right ? right - left : left - right;
    if (distance >= (uintptr_t)call->chunk_bytes)
        return 0;
    PyErr_Format(refuse(module),
                 "destination %zd overlaps %s %zd in %zd of %zd bytes; a destination must share no "
                 "byte with any other buffer",
                 destination, role, index, call->chunk_bytes - (Py_ssize_t)distance,
                 call->chunk_bytes);
    return -1;
}

static int check_disjoint(PyObject *module, const struct call *call)
{
    for (Py_ssize_t d = 0; d < call->destinations.count; d++) {
        for (Py_ssize_t s = 0; s < call->sources.count; s++)
            if (overlap(module, call, d, "source", s, call->sources.pointers[s]))
                return -1;
        for (Py_ssize_t e = 0; e < d; e++)
            if (overlap(module, call, d, "destination", e, call->destinations.pointers[e]))
                return -1;
    }
    return 0;
}

static void release(struct call *call)
{
    struct buffers *both[2] = {&call->sources, &call->destinations};
    for (int side = 0; side < 2; side++) {
        for (Py_ssize_t i = 0; i < both[side]->count; i++)
            PyBuffer_Release(&both[side]->views[i]);
        PyMem_Free(both[side]->views);
        PyMem_Free(both[side]->pointers);
    }
    PyMem_Free(call->coefficients);
}

/* ---- the functions ------------------------------------------------------------------------- */

static int run(const struct hf_level *level, const struct hf_job *job)
{
    size_t touched = (job->source_count + job->destination_count) * job->chunk_bytes;
    int result;
    if (touched < KEEP_GIL_BYTES)
        return hf_multiply(level, job);
    Py_BEGIN_ALLOW_THREADS
    result = hf_multiply(level, job);
    Py_END_ALLOW_THREADS
    return result;
}

static int take(PyObject *module, PyObject *const *args, struct call *call)
{
    PyObject *sources = PySequence_Tuple(args[1]);
    PyObject *destinations = sources ? PySequence_Tuple(args[2]) : NULL;
    int failed = !destinations || take_coefficients(module, args[0], call) ||
                 take_all(module, sources, "source", 0, call, &call->sources) ||
                 take_all(module, destinations, "destination", 1, call, &call->destinations) ||
                 check_counts(module, call) || check_disjoint(module, call);
    /* The views keep the buffers alive; the tuples have done their work. */
    Py_XDECREF(sources);
    Py_XDECREF(destinations);
    return failed ? -1 : 0;
}

/* matmul(coefficients, sources, destinations, accumulate, level, stream, fetch) */
static PyObject *matmul(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct call call = {.chunk_bytes = -1};
    const struct hf_level *level;
    int accumulate, failed;
    long stream, fetch;
    if (count != 7)
        return PyErr_Format(PyExc_TypeError, "matmul takes 7 arguments, got %zd", count);
    level = level_of(module, args[4]);
    accumulate = PyObject_IsTrue(args[3]);
    stream = level ? PyLong_AsLong(args[5]) : 0;
    fetch = level && !PyErr_Occurred() ? PyLong_AsLong(args[6]) : 0;
    if (!level || accumulate < 0 || PyErr_Occurred())
        return NULL;
    failed = take(module, args, &call);
    if (!failed) {
        struct hf_job job = {
            .coefficients = call.coefficients,
            .sources = (const uint8_t *const *)call.sources.pointers,
            .destinations = call.destinations.pointers,
            .source_count = (size_t)call.sources.count,
            .destination_count = (size_t)call.destinations.count,
            .chunk_bytes = call.chunk_bytes < 0 ? 0 : (size_t)call.chunk_bytes,
            .accumulate = accumulate,
            .stream = stream < 0 ? HF_AUTO : stream > 0 ? HF_YES : HF_NO,
            .fetch = fetch < 0 ? HF_AUTO : fetch > 0 ? HF_YES : HF_NO,
        };
        failed = run(level, &job);
        if (failed)
            PyErr_NoMemory();
    }
    release(&call);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* fingerprint(chunk, level) */
static PyObject *fingerprint(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    uint8_t result[HF_FINGERPRINT_BYTES];
    Py_buffer view;
    const struct hf_level *level;
    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "fingerprint takes 2 arguments, got %zd", count);
    level = level_of(module, args[1]);
    if (!level || take_one(module, args[0], "chunk", 0, &view))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    hf_fingerprint(level, view.buf, (size_t)view.len, result);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    return PyBytes_FromStringAndSize((const char *)result, sizeof result);
}

/* levels() -> ((name, usable), ...), best first; a level's index is its place */
static PyObject *levels(PyObject *module, PyObject *unused)
{
    PyObject *result = PyTuple_New((Py_ssize_t)hf_level_count);
    (void)module;
    (void)unused;
    for (size_t i = 0; result && i < hf_level_count; i++) {
        PyObject *pair = Py_BuildValue("(sN)", hf_levels[i].name,
                                       PyBool_FromLong(hf_levels[i].usable()));
        if (!pair || PyTuple_SetItem(result, (Py_ssize_t)i, pair))
            Py_CLEAR(result);
    }
    return result;
}

/* ---- the module ---------------------------------------------------------------------------- */

static int execute(PyObject *module)
{
    struct state *state = PyModule_GetState(module);
    PyObject *errors = PyImport_ImportModule("holdfast.coding.errors");
    if (!errors)
        return -1;
    state->error = PyObject_GetAttrString(errors, "BufferMismatchError");
    Py_DECREF(errors);
    hf_init();
    return state->error ? 0 : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(((struct state *)PyModule_GetState(module))->error);
    return 0;
}

static int clear(PyObject *module)
{
    Py_CLEAR(((struct state *)PyModule_GetState(module))->error);
    return 0;
}

static PyMethodDef methods[] = {
    {"matmul", (PyCFunction)(void (*)(void))matmul, METH_FASTCALL, NULL},
    {"fingerprint", (PyCFunction)(void (*)(void))fingerprint, METH_FASTCALL, NULL},
    {"levels", levels, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "holdfast.coding._native",
    .m_doc = "Products over GF(2^8); see holdfast.coding.native.",
    .m_size = sizeof(struct state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
