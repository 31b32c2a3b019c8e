// The linear transforms of Winograd's convolution with 3x3 filters (Lavin and Gray, 2016, arXiv
// 1509.09308), of images (N, H, W, C) in float32; C is a multiple of 8. See winograd.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

using at::Tensor;

typedef float Vec __attribute__((vector_size(32), aligned(4)));  // eight channels
constexpr int64_t LANES = 8;

// F(m x m, 3 x 3): k x k numbers of the input, k = m + 2, give m x m of the output. In one dimension:
// `input` is B^t (k -> k), `output` A^t (k -> m), `gradient` A (m -> k).
struct F4 {
  static constexpr int m = 4, k = 6;
  static void input(const Vec* x, Vec* y) {
    y[0] = 4 * x[0] - 5 * x[2] + x[4];
    y[1] = x[3] + x[4] - 4 * (x[1] + x[2]);
    y[2] = x[4] - x[3] + 4 * (x[1] - x[2]);
    y[3] = x[4] - x[2] + 2 * (x[3] - x[1]);
    y[4] = x[4] - x[2] - 2 * (x[3] - x[1]);
    y[5] = 4 * x[1] - 5 * x[3] + x[5];
  }
  static void output(const Vec* x, Vec* y) {
    const Vec a = x[1] + x[2], b = x[1] - x[2], c = x[3] + x[4], d = x[3] - x[4];
    y[0] = x[0] + a + c;
    y[1] = b + 2 * d;
    y[2] = a + 4 * c;
    y[3] = b + 8 * d + x[5];
  }
  static void gradient(const Vec* x, Vec* y) {
    const Vec a = x[0] + x[2], b = x[1] + x[3], c = x[0] + 4 * x[2], d = 2 * x[1] + 8 * x[3];
    y[0] = x[0];
    y[1] = a + b;
    y[2] = a - b;
    y[3] = c + d;
    y[4] = c - d;
    y[5] = x[3];
  }
};

struct F2 {
  static constexpr int m = 2, k = 4;
  static void input(const Vec* x, Vec* y) {
    y[0] = x[0] - x[2];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[1] - x[3];
  }
  static void output(const Vec* x, Vec* y) {
    y[0] = x[0] + x[1] + x[2];
    y[1] = x[1] - x[2] - x[3];
  }
  static void gradient(const Vec* x, Vec* y) {
    y[0] = x[0];
    y[1] = x[0] + x[1];
    y[2] = x[0] - x[1];
    y[3] = -x[1];
  }
};

// Apply a transform to columns, then to rows: (I, I) -> (O, O).
template <int I, int O, void (*transform)(const Vec*, Vec*)>
void transform_tile(const Vec (&x)[I][I], Vec (&y)[O][O]) {
  Vec half[O][I], column[I], result[O];
  for (int j = 0; j < I; j++) {
    for (int i = 0; i < I; i++) column[i] = x[i][j];
    transform(column, result);
    for (int i = 0; i < O; i++) half[i][j] = result[i];
  }
  for (int i = 0; i < O; i++) transform(half[i], y[i]);
}

// Call f(image, row, column, tile) for the first pixel of every m x m tile; the last ones may reach
// beyond the image.
template <class F>
void for_each_tile(int64_t n, int64_t h, int64_t w, int m, const F& f) {
  const int64_t rows = (h + m - 1) / m, columns = (w + m - 1) / m;
  at::parallel_for(0, n * rows * columns, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      f(t / (rows * columns), t / columns % rows * m, t % columns * m, t);
  });
}

// Transform tiles of I x I pixels of x, zero outside: (N, H, W, C) -> (k * k, tiles, C).
template <class F, int I, void (*transform)(const Vec*, Vec*)>
void to_tiles(const Tensor& x, Tensor& tiles) {
  constexpr int k = F::k, padding = (I - F::m) / 2;
  const int64_t h = x.size(1), w = x.size(2), c = x.size(3), count = tiles.size(1);
  const float* source = x.data_ptr<float>();
  float* target = tiles.data_ptr<float>();
  for_each_tile(x.size(0), h, w, F::m, [=](int64_t n, int64_t top, int64_t left, int64_t t) {
    for (int64_t channel = 0; channel < c; channel += LANES) {
      Vec in[I][I], out[k][k];
      for (int i = 0; i < I; i++)
        for (int j = 0; j < I; j++) {
          const int64_t y = top - padding + i, z = left - padding + j;
          const float* pixel = source + ((n * h + y) * w + z) * c + channel;
          in[i][j] = y >= 0 && y < h && z >= 0 && z < w ? *(const Vec*)pixel : Vec{};
        }
      transform_tile<I, k, transform>(in, out);
      for (int i = 0; i < k * k; i++)
        *(Vec*)(target + (i * count + t) * c + channel) = out[i / k][i % k];
    }
  });
}

// Transform products to pixels: (k * k, tiles, C) -> (N, H, W, C).
template <class F>
void to_image(const Tensor& tiles, Tensor& y) {
  constexpr int m = F::m, k = F::k;
  const int64_t h = y.size(1), w = y.size(2), c = y.size(3), count = tiles.size(1);
  const float* source = tiles.data_ptr<float>();
  float* target = y.data_ptr<float>();
  for_each_tile(y.size(0), h, w, m, [=](int64_t n, int64_t top, int64_t left, int64_t t) {
    for (int64_t channel = 0; channel < c; channel += LANES) {
      Vec in[k][k], out[m][m];
      for (int i = 0; i < k * k; i++)
        in[i / k][i % k] = *(const Vec*)(source + (i * count + t) * c + channel);
      transform_tile<k, m, F::output>(in, out);
      for (int i = 0; i < std::min<int64_t>(m, h - top); i++)
        for (int j = 0; j < std::min<int64_t>(m, w - left); j++)
          *(Vec*)(target + ((n * h + top + i) * w + left + j) * c + channel) = out[i][j];
    }
  });
}

Tensor empty_tiles(const Tensor& x, int64_t m) {
  const int64_t count = x.size(0) * ((x.size(1) + m - 1) / m) * ((x.size(2) + m - 1) / m);
  return at::empty({(m + 2) * (m + 2), count, x.size(3)}, x.options());
}

Tensor input_tiles(const Tensor& x, int64_t m) {
  Tensor tiles = empty_tiles(x, m);
  m == 4 ? to_tiles<F4, 6, F4::input>(x, tiles) : to_tiles<F2, 4, F2::input>(x, tiles);
  return tiles;
}

Tensor gradient_tiles(const Tensor& grad, int64_t m) {
  Tensor tiles = empty_tiles(grad, m);
  m == 4 ? to_tiles<F4, 4, F4::gradient>(grad, tiles) : to_tiles<F2, 2, F2::gradient>(grad, tiles);
  return tiles;
}

Tensor image(const Tensor& tiles, int64_t n, int64_t h, int64_t w, int64_t m) {
  Tensor y = at::empty({n, h, w, tiles.size(2)}, tiles.options());
  m == 4 ? to_image<F4>(tiles, y) : to_image<F2>(tiles, y);
  return y;
}

TORCH_LIBRARY(kn_zoo_winograd, library) {
  library.def("input_tiles(Tensor x, int m) -> Tensor", &input_tiles);
  library.def("gradient_tiles(Tensor grad, int m) -> Tensor", &gradient_tiles);
  library.def("image(Tensor tiles, int n, int h, int w, int m) -> Tensor", &image);
}
