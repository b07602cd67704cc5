/* enturbo.workers._sha256: SHA-256 chains over SGX measurement records, for any CPython >= 3.11 (abi3).
 *
 * This file only speaks Python: it parses and checks arguments, takes buffers, gives the GIL back while the
 * work runs and stores results once it has succeeded. _sha256_lanes.h turns pages into blocks,
 * _sha256_kernels.h hashes them.
 */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include "_sha256_lanes.h"
#include "_sha256_nt.h"

static const kernel *best_kernel = &PORTABLE;

typedef struct {
    PyTypeObject *chain_type;
} module_state;

/* One SHA-256 chain between two blocks. `busy` is set while a call without the GIL works on a copy of it. */
typedef struct {
    PyObject_HEAD
    uint32_t state[8];
    unsigned long long length;
    const kernel *kernel;
    int busy;
} chain;

static int enter(chain *self)
{
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "this chain is already in use by a call");
        return 0;
    }
    self->busy = 1;
    return 1;
}

static PyObject *chain_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"midstate", "length", "portable", NULL};
    Py_buffer midstate = {0};
    unsigned long long length = 0;
    int portable = 0;
    PyObject *given = NULL, *number = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OOp:Chain", names, &given, &number, &portable))
        return NULL;
    if (number) {
        length = PyLong_AsUnsignedLongLong(number);
        if (PyErr_Occurred())
            return NULL;
    }
    if (length % BLOCK_SIZE)
        return PyErr_Format(PyExc_ValueError, "a chain is a whole number of 64-byte blocks, got %llu bytes", length);
    chain *self = (chain *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->kernel = portable ? &PORTABLE : best_kernel;
    self->length = length;
    if (!given || given == Py_None) {
        memcpy(self->state, INITIAL_STATE, sizeof self->state);
        if (length == 0)
            return (PyObject *)self;
        Py_DECREF(self);
        return PyErr_Format(PyExc_ValueError, "%llu bytes hashed need their midstate", length);
    }
    if (PyObject_GetBuffer(given, &midstate, PyBUF_SIMPLE)) {
        Py_DECREF(self);
        return NULL;
    }
    if (midstate.len == 32) {
        const uint8_t *bytes = midstate.buf;
        for (int i = 0; i < 8; i++)
            self->state[i] = read_u32(bytes + 4 * i);
    } else {
        PyErr_Format(PyExc_ValueError, "a midstate is 32 bytes, got %zd", midstate.len);
        Py_DECREF(self);
        self = NULL;
    }
    PyBuffer_Release(&midstate);
    return (PyObject *)self;
}

static void chain_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *chain_update(chain *self, PyObject *records)
{
    Py_buffer view;
    uint32_t state[8];
    if (PyObject_GetBuffer(records, &view, PyBUF_SIMPLE))
        return NULL;
    if (view.len % BLOCK_SIZE) {
        PyErr_Format(PyExc_ValueError, "records are whole 64-byte blocks, got %zd bytes", view.len);
        PyBuffer_Release(&view);
        return NULL;
    }
    if (!enter(self)) {
        PyBuffer_Release(&view);
        return NULL;
    }
    memcpy(state, self->state, sizeof state);
    Py_BEGIN_ALLOW_THREADS
    run_buffer(self->kernel, state, view.buf, (size_t)view.len / BLOCK_SIZE);
    Py_END_ALLOW_THREADS
    memcpy(self->state, state, sizeof state);
    self->length += (unsigned long long)view.len;
    self->busy = 0;
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *chain_midstate(chain *self, PyObject *Py_UNUSED(ignored))
{
    uint8_t bytes[32];
    for (int i = 0; i < 8; i++)
        store_le(bytes + 4 * i, self->state[i], 4);
    return PyBytes_FromStringAndSize((const char *)bytes, sizeof bytes);
}

static PyObject *chain_digest(chain *self, PyObject *Py_UNUSED(ignored))
{
    uint8_t bytes[32];
    final_digest(self->kernel, self->state, self->length, bytes);
    return PyBytes_FromStringAndSize((const char *)bytes, sizeof bytes);
}

static PyObject *chain_length(chain *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(self->length);
}

/* ---- spans ------------------------------------------------------------------------------------------- */

#define MAX_PAGES ((uint64_t)1 << 40) /* far above any enclave; keeps every product below inside 64 bits */

/* Items first .. first + 4 of `tuple` are first, block, stride, blocks, end. */
static int parse_numbers(PyObject *tuple, Py_ssize_t at, span *span)
{
    static const char *const names[] = {"first", "block", "stride", "blocks", "end"};
    uint64_t *fields[] = {&span->first, &span->block, &span->stride, &span->blocks, &span->end};
    for (int i = 0; i < 5; i++) {
        long long value = PyLong_AsLongLong(PyTuple_GetItem(tuple, at + i));
        if (value == -1 && PyErr_Occurred())
            return 0;
        if (value < 0 || (uint64_t)value > MAX_PAGES) {
            PyErr_Format(PyExc_ValueError, "span.%s is %lld", names[i], value);
            return 0;
        }
        *fields[i] = (uint64_t)value;
    }
    if (span->block == 0 || span->stride < span->block) {
        PyErr_Format(PyExc_ValueError, "span.block is %llu and span.stride %llu: blocks must not be empty or overlap",
                     (unsigned long long)span->block, (unsigned long long)span->stride);
        return 0;
    }
    return 1;
}

/* One past the last page that the span touches; 0 if it touches none. */
static uint64_t span_limit(const span *span)
{
    if (span->blocks == 0 || span->first >= span->end)
        return 0;
    uint64_t last = span->blocks - 1;
    if (last > (span->end - 1 - span->first) / span->stride)
        last = (span->end - 1 - span->first) / span->stride;
    uint64_t stop = span->first + last * span->stride + span->block;
    return stop < span->end ? stop : span->end;
}

static int covers(const Py_buffer *view, const char *what, uint64_t limit, uint64_t size)
{
    if ((uint64_t)view->len / size >= limit)
        return 1;
    PyErr_Format(PyExc_IndexError, "span reaches page %llu, its %s end after %llu", (unsigned long long)limit - 1, what,
                 (unsigned long long)((uint64_t)view->len / size));
    return 0;
}

/* Span(pages, first, block, stride, blocks, end); pages = (entries, data or None). Takes up to two buffers. */
static int parse_span(PyObject *tuple, span *span, Py_buffer *entries, Py_buffer *data)
{
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 6) {
        PyErr_SetString(PyExc_TypeError, "a span is (pages, first, block, stride, blocks, end)");
        return 0;
    }
    PyObject *pages = PyTuple_GetItem(tuple, 0);
    if (!PyTuple_Check(pages) || PyTuple_Size(pages) != 2) {
        PyErr_SetString(PyExc_TypeError, "span.pages is (entries, data)");
        return 0;
    }
    if (!parse_numbers(tuple, 1, span))
        return 0;
    uint64_t limit = span_limit(span);
    if (PyObject_GetBuffer(PyTuple_GetItem(pages, 0), entries, PyBUF_SIMPLE))
        return 0;
    if (!covers(entries, "EPCM entries", limit, ENTRY_SIZE))
        return 0;
    /* An empty buffer may have no address, and NULL entries mean something else. */
    span->entries = entries->buf ? entries->buf : (const uint8_t *)"";
    if (PyTuple_GetItem(pages, 1) == Py_None)
        return 1;
    if (PyObject_GetBuffer(PyTuple_GetItem(pages, 1), data, PyBUF_SIMPLE) || !covers(data, "data", limit, PAGE_SIZE))
        return 0;
    span->data = data->buf;
    return 1;
}

/* EaddSpan(base, flags, first, block, stride, blocks, end): pages of which only the EADD is measured. */
static int parse_eadd_span(PyObject *tuple, span *span)
{
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 7) {
        PyErr_SetString(PyExc_TypeError, "an EADD span is (base, flags, first, block, stride, blocks, end)");
        return 0;
    }
    long long base = PyLong_AsLongLong(PyTuple_GetItem(tuple, 0));
    if (base == -1 && PyErr_Occurred())
        return 0;
    unsigned long long flags = PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, 1));
    if (PyErr_Occurred() || !parse_numbers(tuple, 2, span))
        return 0;
    uint64_t limit = span_limit(span);
    if (base > (long long)MAX_PAGES || base < -(long long)MAX_PAGES ||
        (limit && (base + (long long)span->first < 0 || base + (long long)limit > (long long)MAX_PAGES))) {
        PyErr_Format(PyExc_ValueError, "EADD span: no page offset at base %lld, first %llu, limit %llu", base,
                     (unsigned long long)span->first, (unsigned long long)limit);
        return 0;
    }
    span->base = base;
    span->flags = flags;
    return 1;
}

/* ---- whole calls --------------------------------------------------------------------------------------- */

typedef struct {
    chain *chain;
    Py_buffer entries, data;
} hold;

/* Everything checked and taken before the GIL goes, stored after it is back: a failed call changes nothing. */
static PyObject *run(PyObject *module, PyObject *args, int generated)
{
    module_state *state = PyModule_GetState(module);
    PyObject *chains, *spans, *result = NULL;
    if (!PyArg_ParseTuple(args, "OO", &chains, &spans))
        return NULL;
    Py_ssize_t count = PySequence_Size(chains), given = PySequence_Size(spans), taken = 0;
    if (count < 0 || given < 0)
        return NULL;
    if (count != given)
        return PyErr_Format(PyExc_ValueError, "%zd chains, but %zd spans", count, given);
    job *jobs = PyMem_Calloc((size_t)count + 1, sizeof *jobs);
    hold *holds = PyMem_Calloc((size_t)count + 1, sizeof *holds);
    const kernel *kernel = best_kernel;
    int ran;
    if (!jobs || !holds) {
        PyErr_NoMemory();
        goto done;
    }
    for (; taken < count; taken++) {
        hold *hold = &holds[taken];
        job *job = &jobs[taken];
        PyObject *item = PySequence_GetItem(chains, taken);
        if (item && !PyObject_TypeCheck(item, state->chain_type)) {
            PyErr_SetString(PyExc_TypeError, "not a chain of this hasher");
            Py_CLEAR(item);
        }
        if (!item)
            goto done;
        if (!enter((chain *)item)) {
            Py_DECREF(item);
            goto done;
        }
        hold->chain = (chain *)item;
        PyObject *tuple = PySequence_GetItem(spans, taken);
        if (!tuple)
            goto done;
        int fine = generated ? parse_eadd_span(tuple, &job->span)
                             : parse_span(tuple, &job->span, &hold->entries, &hold->data);
        Py_DECREF(tuple);
        if (!fine)
            goto done;
        memcpy(job->state, hold->chain->state, sizeof job->state);
        if (hold->chain->kernel == &PORTABLE)
            kernel = &PORTABLE;
    }
    Py_BEGIN_ALLOW_THREADS
    ran = run_lanes(kernel, jobs, (size_t)count);
    Py_END_ALLOW_THREADS
    if (!ran) {
        PyErr_SetString(PyExc_ValueError, "a page of the span is measured, but the span has no data");
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        memcpy(holds[i].chain->state, jobs[i].state, sizeof jobs[i].state);
        holds[i].chain->length += jobs[i].length;
    }
    result = Py_NewRef(Py_None);
done:
    for (Py_ssize_t i = 0; holds && i < count && holds[i].chain; i++) {
        holds[i].chain->busy = 0;
        Py_DECREF(holds[i].chain);
        PyBuffer_Release(&holds[i].entries); /* does nothing for a buffer never taken */
        PyBuffer_Release(&holds[i].data);
    }
    PyMem_Free(jobs);
    PyMem_Free(holds);
    return result;
}

static PyObject *extend(PyObject *module, PyObject *args) { return run(module, args, 0); }

static PyObject *extend_eadd(PyObject *module, PyObject *args) { return run(module, args, 1); }

/* Chain.eadd_run(page, count, flags): one block that is the whole span. */
static PyObject *chain_eadd_run(chain *self, PyObject *args)
{
    long long page, count;
    unsigned long long flags;
    if (!PyArg_ParseTuple(args, "LLK:eadd_run", &page, &count, &flags))
        return NULL;
    if (page < 0 || count < 0 || page > (long long)MAX_PAGES || count > (long long)MAX_PAGES - page)
        return PyErr_Format(PyExc_ValueError, "no run of %lld pages at page %lld", count, page);
    if (!enter(self))
        return NULL;
    job job = {0};
    memcpy(job.state, self->state, sizeof job.state);
    job.span.block = job.span.stride = job.span.end = (uint64_t)count;
    job.span.blocks = 1;
    job.span.base = page;
    job.span.flags = flags;
    Py_BEGIN_ALLOW_THREADS
    run_lanes(self->kernel, &job, count > 0);
    Py_END_ALLOW_THREADS
    memcpy(self->state, job.state, sizeof job.state);
    self->length += job.length;
    self->busy = 0;
    Py_RETURN_NONE;
}

/* ---- filling warm memory ------------------------------------------------------------------------------- */

static PyObject *py_copy_nt(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer to, from;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "w*y*:copy_nt", &to, &from))
        return NULL;
    const uint8_t *source = from.buf;
    uint8_t *target = to.buf;
    if (to.len != from.len) {
        PyErr_Format(PyExc_ValueError, "cannot copy %zd bytes into %zd", from.len, to.len);
    } else if (source < target + to.len && target < source + from.len) {
        PyErr_SetString(PyExc_ValueError, "source and target overlap");
    } else {
        Py_BEGIN_ALLOW_THREADS
        copy_nt(target, source, (size_t)to.len);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    return result;
}

/* copy_rows_nt(dst, src, width, stride, rows): `rows` pieces of `width` bytes, `stride` apart in both. */
static PyObject *py_copy_rows_nt(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer to, from;
    Py_ssize_t width, stride, rows;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "w*y*nnn:copy_rows_nt", &to, &from, &width, &stride, &rows))
        return NULL;
    const uint8_t *source = from.buf;
    uint8_t *target = to.buf;
    Py_ssize_t shorter = to.len < from.len ? to.len : from.len;
    if (width < 0 || stride < width || rows < 0 ||
        (rows && (width > shorter || (stride && rows - 1 > (shorter - width) / stride)))) {
        PyErr_Format(PyExc_ValueError, "%zd pieces of %zd bytes, %zd apart, do not lie in %zd bytes", rows, width,
                     stride, shorter);
    } else if (source < target + to.len && target < source + from.len) {
        PyErr_SetString(PyExc_ValueError, "source and target overlap");
    } else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t row = 0; row < rows; row++)
            copy_nt(target + row * stride, source + row * stride, (size_t)width);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    return result;
}

static PyObject *py_zero_nt(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer to;
    if (!PyArg_ParseTuple(args, "w*:zero_nt", &to))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    zero_nt(to.buf, (size_t)to.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&to);
    Py_RETURN_NONE;
}

/* ---- module -------------------------------------------------------------------------------------------- */

static PyMethodDef chain_methods[] = {
    {"update", (PyCFunction)chain_update, METH_O, "Append whole 64-byte blocks."},
    {"eadd_run", (PyCFunction)chain_eadd_run, METH_VARARGS, "Append the EADDs of pages page .. page + count - 1."},
    {"midstate", (PyCFunction)chain_midstate, METH_NOARGS, "Eight u32 words, little-endian."},
    {"digest", (PyCFunction)chain_digest, METH_NOARGS, "SHA-256 of all so far; the chain goes on."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef chain_getset[] = {
    {"length", (getter)chain_length, NULL, "Bytes hashed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot chain_slots[] = {
    {Py_tp_doc, "Chain(midstate=None, length=0, portable=False): one SHA-256 chain between two blocks."},
    {Py_tp_new, chain_new},
    {Py_tp_dealloc, chain_dealloc},
    {Py_tp_methods, chain_methods},
    {Py_tp_getset, chain_getset},
    {0, NULL},
};

static PyType_Spec chain_spec = {
    .name = "enturbo.workers._sha256.Chain",
    .basicsize = sizeof(chain),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = chain_slots,
};

static PyMethodDef module_methods[] = {
    {"extend", extend, METH_VARARGS, "extend(chains, spans): append the records of spans[i] to chains[i]."},
    {"extend_eadd", extend_eadd, METH_VARARGS, "extend_eadd(chains, spans): the same for EADD-only spans."},
    {"copy_nt", py_copy_nt, METH_VARARGS, "copy_nt(dst, src): copy past the caches, then sfence."},
    {"copy_rows_nt", py_copy_rows_nt, METH_VARARGS,
     "copy_rows_nt(dst, src, width, stride, rows): copy pieces that stand at the same stride in both."},
    {"zero_nt", py_zero_nt, METH_VARARGS, "zero_nt(dst): zero past the caches, then sfence."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    best_kernel = detect_kernel();
    state->chain_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &chain_spec, NULL);
    if (!state->chain_type || PyModule_AddType(module, state->chain_type))
        return -1;
    return PyModule_AddStringConstant(module, "KERNEL", best_kernel->name);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->chain_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->chain_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_sha256",
    .m_doc = "SHA-256 chains over SGX measurement records, and non-temporal copies.",
    .m_size = sizeof(module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__sha256(void) { return PyModuleDef_Init(&definition); }
