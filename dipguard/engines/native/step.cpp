// One fit step's forward and backward pass for a stack of images: a short program, run for one image at a time, so that
// all that an image needs stays in its core's cache. Threads take an image each; those without one help with another's.
// Images share nothing: a result depends on no neighbour and on no number of threads, bit for bit.
//
// The program and the frames come from dipguard/engines/native_plan.py.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <vector>

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
    REAL tolerance;     // errors up to it cost nothing
    const REAL* weights;
    REAL* gradient;
    REAL* reconstruction;  // [3][height][width]
    REAL* error;
    REAL* z_gradient;  // as z, or null: no one asks for it
};

// Calls visit(position in [channels][height][width], the frame's number) for these rows of a frame.
template <class Visit>
INLINE void visit_rows(const Frame& f, Part rows, REAL* workspace, Visit visit) {
    for (index_t c = 0; c < f.channels; c++)
        for (index_t y = rows.first; y < rows.last; y++)
            for (index_t x = 0; x < f.width; x++) visit((c * f.height + y) * f.width + x, *(f.at(workspace, y, x) + c));
}

INLINE REAL beyond(REAL difference, REAL tolerance) {
    return difference - std::min(tolerance, std::max(-tolerance, difference));  // NaN stays NaN
}

// Sigmoid; replaces the frame by the mean squared error's gradient with respect to it.
static void reconstruct(const Frame& f, const Image& image, REAL* workspace, Part rows) {
    const REAL factor = REAL(2) / (f.channels * f.height * f.width);
    visit_rows(f, rows, workspace, [&](index_t at, REAL& value) {
        const REAL made = REAL(1) / (REAL(1) + std::exp(-value));
        image.reconstruction[at] = made;
        value = factor * beyond(made - image.given[at], image.tolerance) * made * (1 - made);
    });
}

static REAL mean_squared_error(const Image& image, index_t numbers) {
    double total = 0;
    for (index_t at = 0; at < numbers; at++) {
        const REAL difference = beyond(image.reconstruction[at] - image.given[at], image.tolerance);
        total += double(difference) * difference;
    }
    return REAL(total / numbers);
}

// Runs an instruction, up to where its numbers may be read: whether the next one may follow at once (see below).
static void run(const Instruction& op, const Frame* frames, const Image& image, REAL* workspace, REAL slope, REAL eps,
                const Team& team) {
    const Frame &in = frames[op.in], &out = frames[op.out];
    const Convolution conv{op.kernel, op.stride, op.pad, image.weights + op.weight, image.weights + op.bias};
    const Normalisation norm{image.weights + op.weight, image.weights + op.bias, workspace + op.statistics,
                             workspace + op.statistics + in.padded, op.leaky ? slope : REAL(1)};
    REAL* room = workspace + op.room;
    switch (op.operation) {
        case READ_Z: {
            const Part rows = team.part(out.height);
            visit_rows(out, rows, workspace, [&](index_t at, REAL& value) { value = image.z[at]; });
            fill_border(out, workspace, rows);
            return team.wait();
        }
        case CONVOLVE:
            return convolve(conv, in, out, workspace, team);
        case NORMALISE:
            normalise(norm, eps, in, out, workspace, room, team);
            fill_border(out, workspace, team.part(out.height));
            return team.wait();
        case UPSAMPLE:
            return upsample(in, out, op.first, workspace, team);
        case LOSS:
            reconstruct(in, image, workspace, team.part(in.height));
            team.wait();
            if (team.leads()) *image.error = mean_squared_error(image, in.channels * in.height * in.width);
            return;
        case NORMALISE_BACK:
            normalise_back(norm, in, out, workspace, image.gradient + op.weight, image.gradient + op.bias, room, team);
            return team.wait();
        case WEIGHT_GRADIENT:
            weight_gradient(conv, in, out, workspace, image.gradient + op.weight, team);
            return team.wait();
        case BIAS_GRADIENT:
            if (team.leads()) bias_gradient(out, workspace, image.gradient + op.bias);
            return;
        case NO_BIAS_GRADIENT:  // a normalisation follows, which takes any constant away again
            if (team.leads()) std::memset(image.gradient + op.bias, 0, out.padded * sizeof(REAL));
            return;
        case CLEAR: {
            const Part numbers = team.part(in.size());
            std::memset(workspace + in.offset + numbers.first, 0, (numbers.last - numbers.first) * sizeof(REAL));
            return;  // convolve_back waits before it adds
        }
        case CONVOLVE_BACK:
            convolve_back(conv, in, out, workspace, room, team);
            return team.wait();
        case FOLD_BORDER:
            return fold_border(in, workspace, team.part(in.height));
        case UPSAMPLE_BACK:
            return upsample_back(in, out, op.first, workspace, team);
        case WRITE_Z_GRADIENT:
            return visit_rows(in, team.part(in.height), workspace,
                              [&](index_t at, REAL& value) { image.z_gradient[at] = value; });
    }
}

// Arrays of the stack begin with one entry an image; `workspaces` holds zeros at first, `room` numbers each, for as many
// images as are run at once; `z_gradients` is null unless the program writes them. `teams`: whether threads without an
// image of their own help with another's.
extern "C" void stack_step(const Frame* frames, const Instruction* program, index_t length, index_t images,
                           index_t threads, index_t teams, const REAL* z, index_t z_size, const REAL* given,
                           index_t image_size, const REAL* tolerances, const REAL* weights, REAL* gradients, index_t parameters,
                           REAL* reconstructions, REAL* errors, REAL* z_gradients, REAL* workspaces, index_t room,
                           double slope, double eps) {
    const auto run_image = [&](index_t b, REAL* workspace, const Team& team) {
        const Image image{z + b * z_size,           given + b * image_size,           tolerances[b],
                          weights + b * parameters,
                          gradients + b * parameters, reconstructions + b * image_size, errors + b,
                          z_gradients ? z_gradients + b * z_size : nullptr};
        for (index_t i = 0; i < length; i++)
            run(program[i], frames, image, workspace, REAL(slope), REAL(eps), team);
    };
    Barrier everyone;
    std::vector<Barrier> barriers(std::min(images, threads));
#pragma omp parallel num_threads(teams ? threads : std::min(images, threads))
    {
#ifdef _OPENMP
        const index_t thread = omp_get_thread_num(), present = omp_get_num_threads();
#else
        const index_t thread = 0, present = 1;
#endif
        // Rounds in which each thread has an image of its own, then one with the images that are left, a team each.
        const index_t left = teams ? images % present : 0, alone = images - left;
#pragma omp for schedule(dynamic, 1) nowait
        for (index_t b = 0; b < alone; b++) run_image(b, workspaces + thread * room, Team{0, 1, nullptr});
        if (left > 0) {
            const index_t members = present / left, team = thread / members;
            everyone.wait(present);  // for the workspaces
            if (team < left)
                run_image(alone + team, workspaces + team * room, Team{thread % members, members, &barriers[team]});
        }
    }
}
