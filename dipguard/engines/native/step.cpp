// One fit step's forward and backward pass for a stack of images: a short program, run for one image at a time, so that
// all that an image needs stays in its core's cache. Images share nothing: a result depends on no neighbour, bit for bit.
//
// The program and the frames come from dipguard/engines/native_plan.py.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "convolution.h"
#include "normalisation.h"
#include "resample.h"

enum Operation : index_t {
    READ_Z,
    CONVOLVE,
    NORMALISE,
    UPSAMPLE,
    LOSS,
    NORMALISE_BACK,
    WEIGHT_GRADIENT,
    BIAS_GRADIENT,
    NO_BIAS_GRADIENT,
    CLEAR,
    CONVOLVE_BACK,
    FOLD_BORDER,
    UPSAMPLE_BACK,
    WRITE_Z_GRADIENT,
};

struct Instruction {
    index_t operation, in, out;    // in, out: numbers of frames
    index_t weight, bias;          // offsets of parameters
    index_t kernel, stride, pad;
    index_t statistics;            // offset in the workspace
    index_t first;                 // first channel
    index_t leaky;
    index_t room;                  // offset of scratch numbers in the workspace
};

struct Image {
    const REAL* z;      // [depth][height][width]
    const REAL* given;  // [3][height][width]
    const REAL* weights;
    REAL* gradient;
    REAL* reconstruction;  // [3][height][width]
    REAL* error;
    REAL* z_gradient;  // as z, or null: no one asks for it
};

static void read_z(const Frame& f, const REAL* z, REAL* workspace) {
    for (index_t c = 0; c < f.channels; c++)
        for (index_t y = 0; y < f.height; y++)
            for (index_t x = 0; x < f.width; x++) *(f.at(workspace, y, x) + c) = *z++;
}

static void write_z_gradient(const Frame& f, REAL* gradient, REAL* workspace) {
    for (index_t c = 0; c < f.channels; c++)
        for (index_t y = 0; y < f.height; y++)
            for (index_t x = 0; x < f.width; x++) *gradient++ = *(f.at(workspace, y, x) + c);
}

// Sigmoid and mean squared error; replaces the frame by the error's gradient with respect to it.
static void loss(const Frame& f, const Image& image, REAL* workspace) {
    const index_t pixels = f.height * f.width;
    const REAL factor = REAL(2) / (f.channels * pixels);
    double total = 0;
    for (index_t c = 0; c < f.channels; c++)
        for (index_t y = 0; y < f.height; y++)
            for (index_t x = 0; x < f.width; x++) {
                const index_t at = c * pixels + y * f.width + x;
                REAL* value = f.at(workspace, y, x) + c;
                const REAL made = REAL(1) / (REAL(1) + std::exp(-*value));
                const REAL difference = made - image.given[at];
                image.reconstruction[at] = made;
                total += double(difference) * difference;
                *value = factor * difference * made * (1 - made);
            }
    *image.error = REAL(total / (f.channels * pixels));
}

static void run(const Instruction& op, const Frame* frames, const Image& image, REAL* workspace, REAL slope, REAL eps) {
    const Frame &in = frames[op.in], &out = frames[op.out];
    const Convolution conv{op.kernel, op.stride, op.pad, image.weights + op.weight, image.weights + op.bias};
    const Normalisation norm{image.weights + op.weight, image.weights + op.bias, workspace + op.statistics,
                             workspace + op.statistics + in.padded, op.leaky ? slope : REAL(1)};
    switch (op.operation) {
        case READ_Z:
            read_z(out, image.z, workspace);
            fill_border(out, workspace);
            break;
        case CONVOLVE:
            convolve(conv, in, out, workspace);
            break;
        case NORMALISE:
            normalise(norm, eps, in, out, workspace);
            fill_border(out, workspace);
            break;
        case UPSAMPLE:
            upsample(in, out, op.first, workspace);
            break;
        case LOSS:
            loss(in, image, workspace);
            break;
        case NORMALISE_BACK:
            normalise_back(norm, in, out, workspace, image.gradient + op.weight, image.gradient + op.bias);
            break;
        case WEIGHT_GRADIENT:
            weight_gradient(conv, in, out, workspace, image.gradient + op.weight);
            break;
        case BIAS_GRADIENT:
            bias_gradient(out, workspace, image.gradient + op.bias);
            break;
        case NO_BIAS_GRADIENT:  // a normalisation follows, which takes any constant away again
            std::memset(image.gradient + op.bias, 0, out.padded * sizeof(REAL));
            break;
        case CLEAR:
            std::memset(workspace + in.offset, 0, in.size() * sizeof(REAL));
            break;
        case CONVOLVE_BACK:
            convolve_back(conv, in, out, workspace, workspace + op.room);
            break;
        case FOLD_BORDER:
            fold_border(in, workspace);
            break;
        case UPSAMPLE_BACK:
            upsample_back(in, out, op.first, workspace, workspace + op.room);
            break;
        case WRITE_Z_GRADIENT:
            write_z_gradient(in, image.z_gradient, workspace);
            break;
    }
}

// Arrays of the stack begin with one entry an image; `workspaces` holds zeros at first, `room` numbers a thread;
// `z_gradients` is null unless the program writes them.
extern "C" void stack_step(const Frame* frames, const Instruction* program, index_t length, index_t images,
                           index_t threads, const REAL* z, index_t z_size, const REAL* given, index_t image_size,
                           const REAL* weights, REAL* gradients, index_t parameters, REAL* reconstructions,
                           REAL* errors, REAL* z_gradients, REAL* workspaces, index_t room, double slope, double eps) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (index_t b = 0; b < images; b++) {
#ifdef _OPENMP
        REAL* workspace = workspaces + omp_get_thread_num() * room;
#else
        REAL* workspace = workspaces;
#endif
        const Image image{z + b * z_size,           given + b * image_size,           weights + b * parameters,
                          gradients + b * parameters, reconstructions + b * image_size, errors + b,
                          z_gradients ? z_gradients + b * z_size : nullptr};
        for (index_t i = 0; i < length; i++) run(program[i], frames, image, workspace, REAL(slope), REAL(eps));
    }
}
