#include "gelu.h"
#include "gemm_pack.h"
#include "kernels.h"
#include "parallel.h"

// c = a b^T of large float32 matrices, after Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication". The larger operand is "left": its elements are broadcast. The other is "right": it is packed once,
// in panels as wide as a tile. A tile of products stays in registers for one piece of inner; the sums of the pieces are
// added up in memory, which is more exact than one chain.

namespace ditfast::host::DITFAST_ISA {
namespace {

// Of one task, so that right's piece stays in the L2 cache. Rows are halved where there are many threads.
constexpr std::int64_t kBlockRows = 96, kBlockColumns = 384;
constexpr std::int64_t kTile = kTileRows * kTileWidth;
constexpr std::int64_t kLeftFloats = kTileRows * kLeftStride;
constexpr std::int64_t kMostPacked = std::int64_t{1} << 23;  // floats of right that are packed at once
static_assert(kBlockRows % (8 * kTileRows) == 0 && kBlockRows % kLanes == 0 && kBlockColumns % kTileWidth == 0);

// What a sum becomes with its bias: c, and act after GELU. Passed by value, as in the row kernels.
struct Result {
    float *c, *act;

    template <class Extent>
    void put(std::int64_t at, Vec sum, Extent extent) const {
        if (c) store(c + at, sum, extent);
        if (act) store(act + at, gelu<float>(sum), extent);
    }
};

struct Operands {
    Matrix left;   // (rows, inner)
    Matrix right;  // (columns, inner)
    std::int64_t rows, columns, inner;
    std::int64_t piece;
    bool is_transposed;  // left's rows are c's columns
    const float* bias;   // along c's columns
    Result result;
    std::int64_t stride;  // of c's rows
};

Operands operands(const Gemm& g) {
    const std::int64_t pieces = ceil_div(g.inner, kPiece);
    const std::int64_t piece = padded(ceil_div(g.inner, pieces));
    if (g.rows >= g.columns) {
        return {g.a, g.b, g.rows, g.columns, g.inner, piece, false, g.bias, {g.c, g.act}, g.columns};
    }
    return {g.b, g.a, g.columns, g.rows, g.inner, piece, true, g.bias, {g.c, g.act}, g.columns};
}

// sums[kTileRows][kTileWidth] of a piece, added to what is there unless it is the first. Left is dense if what is next
// to each other in it are inner elements, not rows.
template <bool kIsDense, bool kIsFirst>
void multiply(const float* left, const float* panel, std::int64_t inner, float* sums) {
    constexpr std::int64_t stride_row = kIsDense ? kLeftStride : 1, stride_inner = kIsDense ? 1 : kTileRows;
    Vec c[kTileRows][kTileColumns] = {};
    for (std::int64_t k = 0; k < inner; ++k) {
        Vec columns[kTileColumns];
        for (int j = 0; j < kTileColumns; ++j) columns[j] = load(panel + k * kTileWidth + j * kLanes);
        for (int i = 0; i < kTileRows; ++i) {
            const Vec factor = splat(left[i * stride_row + k * stride_inner]);
            for (int j = 0; j < kTileColumns; ++j) c[i][j] += factor * columns[j];
        }
    }
    for (int i = 0; i < kTileRows; ++i) {
        for (int j = 0; j < kTileColumns; ++j) {
            float* sum = sums + i * kTileWidth + j * kLanes;
            store(sum, kIsFirst ? c[i][j] : load(sum) + c[i][j]);
        }
    }
}

// A block of c: rows from `row` and columns from `column` on, as left and right count them.
struct Block {
    std::int64_t row, column, rows, columns;

    std::int64_t tiles() const { return ceil_div(rows, kTileRows); }
    std::int64_t panels() const { return ceil_div(columns, kTileWidth); }
};

inline float* sums_of(float* sums, const Block& block, std::int64_t tile, std::int64_t panel) {
    return sums + (tile * block.panels() + panel) * kTile;
}

// The block as it lies in c or act; nothing if that is null.
Ahead lines_of(float* result, const Operands& o, const Block& block) {
    if (!result) return {};
    const std::int64_t row = o.is_transposed ? block.column : block.row;
    const std::int64_t column = o.is_transposed ? block.row : block.column;
    const Matrix c{result + row * o.stride + column, o.stride, 1};
    return o.is_transposed ? Ahead(c, block.columns, block.rows) : Ahead(c, block.rows, block.columns);
}

// The result of a tile where left's rows are c's rows.
void write_tile(const Operands& o, const Block& block, std::int64_t tile, std::int64_t panel, const float* sums) {
    const std::int64_t row = tile * kTileRows, column = block.column + panel * kTileWidth;
    const std::int64_t rows = smaller(kTileRows, block.rows - row);
    const std::int64_t columns = smaller(kTileWidth, block.column + block.columns - column);
    const Result result = o.result;
    for_each_vector(columns, [&](std::int64_t j, auto extent) {
        const Vec bias = o.bias ? load(o.bias + column + j, extent) : Vec{};
        for (std::int64_t i = 0; i < rows; ++i) {
            const std::int64_t at = (block.row + row + i) * o.stride + column + j;
            result.put(at, load(sums + i * kTileWidth + j) + bias, extent);
        }
    });
}

// The result of a block where they are c's columns.
void write_columns(const Operands& o, const Block& block, float* sums) {
    const Result result = o.result;
    for_each_vector(block.rows, [&](std::int64_t row, auto extent) {
        const Vec bias = o.bias ? load(o.bias + block.row + row, extent) : Vec{};
        for (std::int64_t column = 0; column < block.columns; column += kLanes) {
            Vec square[kLanes];
            for (std::int64_t i = 0; i < kLanes; ++i) {
                const float* tile = sums_of(sums, block, (row + i) / kTileRows, column / kTileWidth);
                square[i] = load(tile + (row + i) % kTileRows * kTileWidth + column % kTileWidth);
            }
            transpose(square);
            for (std::int64_t i = 0; i < smaller(kLanes, block.columns - column); ++i) {
                result.put((block.column + column + i) * o.stride + block.row + row, square[i] + bias, extent);
            }
        }
    });
}

template <bool kIsDense>
void multiply_block(const Operands& o, const Block& block, const float* packed, const Ahead& next, float* scratch) {
    float *left = scratch, *sums = scratch + kLeftFloats;
    const std::int64_t tiles = block.tiles() * block.panels();
    for (std::int64_t k = 0; k < o.inner; k += o.piece) {
        const std::int64_t inner = smaller(o.piece, o.inner - k), rest = o.inner - k - inner;
        Ahead ahead = next, c, act;
        if (rest > 0) ahead = Ahead(part_of(o.left, block.row, k + inner), block.rows, smaller(rest, o.piece));
        if (rest == 0) c = lines_of(o.result.c, o, block), act = lines_of(o.result.act, o, block);  // stores wait, too
        const std::int64_t share = ceil_div(ahead.count(), tiles);
        const std::int64_t c_share = ceil_div(c.count(), tiles), act_share = ceil_div(act.count(), tiles);
        for (std::int64_t tile = 0; tile < block.tiles(); ++tile) {
            const auto copy = kIsDense ? copy_rows : copy_columns;
            copy(part_of(o.left, block.row + tile * kTileRows, k), block.rows - tile * kTileRows, inner, left);
            for (std::int64_t panel = 0; panel < block.panels(); ++panel) {
                ahead.fetch(share);
                c.fetch(c_share);
                act.fetch(act_share);
                float* sum = sums_of(sums, block, tile, panel);
                const auto multiply_this = k == 0 ? multiply<kIsDense, true> : multiply<kIsDense, false>;
                multiply_this(left, packed + panel * kTileWidth * o.inner + k * kTileWidth, inner, sum);
                if (rest == 0 && !o.is_transposed) write_tile(o, block, tile, panel, sum);
            }
        }
    }
    if (o.is_transposed) write_columns(o, block, sums);
}

// Columns from `first` on, so many that what is packed stays small.
void run_columns(const Operands& o, std::int64_t first, std::int64_t columns, int threads) {
    const std::int64_t panels = ceil_div(columns, kTileWidth), panel_floats = kTileWidth * o.inner;
    float* packed = workspace(static_cast<std::size_t>(panels * panel_floats));
    parallel(panels, threads, 0, [&](std::int64_t panel, float*) {
        const std::int64_t column = panel * kTileWidth;
        pack_right(part_of(o.right, first + column, 0), columns - column, o.inner, packed + panel * panel_floats);
    });
    const std::int64_t column_blocks = ceil_div(panels, kBlockColumns / kTileWidth);
    const std::int64_t wide = ceil_div(panels, column_blocks) * kTileWidth;  // all blocks about as wide
    std::int64_t high = kBlockRows;
    while (high > kTileRows && ceil_div(o.rows, high) * column_blocks < 2 * threads) high /= 2;
    // all blocks about as high, and equally many per thread
    const std::int64_t row_tiles = ceil_div(o.rows, kTileRows);
    std::int64_t row_blocks = ceil_div(o.rows, high);
    while (row_blocks * column_blocks % threads > 0 && row_blocks < row_tiles) ++row_blocks;
    const auto row_of = [&](std::int64_t i) { return smaller(o.rows, row_tiles * i / row_blocks * kTileRows); };
    const auto block_of = [&](std::int64_t i) -> Block {
        const std::int64_t row = row_of(i % row_blocks), column = i / row_blocks * wide;
        return {row, first + column, row_of(i % row_blocks + 1) - row, smaller(wide, columns - column)};
    };
    // several blocks to a task, so that one can fetch what the next begins with; the larger tasks come first
    const std::int64_t blocks = row_blocks * column_blocks, tasks = smaller(blocks, 4 * threads);
    const auto first_of = [&](std::int64_t task) { return blocks / tasks * task + smaller(task, blocks % tasks); };
    const std::int64_t scratch_floats = kLeftFloats + kBlockRows * kBlockColumns;
    const auto multiply_this = o.left.stride_inner == 1 ? multiply_block<true> : multiply_block<false>;
    parallel(tasks, threads, scratch_floats, [&](std::int64_t task, float* scratch) {
        const std::int64_t end = first_of(task + 1);
        for (std::int64_t i = first_of(task); i < end; ++i) {
            const Block block = block_of(i), after = block_of(i + 1);
            Ahead next;
            if (i + 1 < end) next = Ahead(part_of(o.left, after.row, 0), after.rows, smaller(o.piece, o.inner));
            multiply_this(o, block, packed + (block.column - first) * o.inner, next, scratch);
        }
    });
}

}  // namespace

void gemm(const Gemm& call, int threads) {
    const Operands o = operands(call);
    const std::int64_t columns = larger(1, kMostPacked / (o.inner * kTileWidth)) * kTileWidth;
    for (std::int64_t first = 0; first < o.columns; first += columns) {
        run_columns(o, first, smaller(columns, o.columns - first), threads);
    }
}

}  // namespace ditfast::host::DITFAST_ISA
