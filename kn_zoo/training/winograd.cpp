// The linear transforms of Winograd's convolution, on images (N, H, W, C) in float32. See winograd.py.
//
// k x k pixels of the input give m x m of the output, m = k - r + 1 for filters of r x r. The
// transforms evaluate polynomials at 0, 1, -1, for k = 6 also at 2 and -2, and at infinity.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

using at::Tensor;

typedef float Vec __attribute__((vector_size(32), aligned(4)));  // eight channels
constexpr int64_t LANES = 8;

// B^t in one dimension: k numbers of the input -> k.
template <int k>
void transform_input(const Vec* x, Vec* y);

template <>
void transform_input<4>(const Vec* x, Vec* y) {
  y[0] = x[0] - x[2];
  y[1] = x[2] + x[1];
  y[2] = x[2] - x[1];
  y[3] = x[3] - x[1];
}

template <>
void transform_input<6>(const Vec* x, Vec* y) {
  const Vec a = x[4] - 4 * x[2], b = x[3] - 4 * x[1], c = x[4] - x[2], d = 2 * (x[3] - x[1]);
  y[0] = 4 * x[0] - 5 * x[2] + x[4];
  y[1] = a + b;
  y[2] = a - b;
  y[3] = c + d;
  y[4] = c - d;
  y[5] = 4 * x[1] - 5 * x[3] + x[5];
}

// A^t in one dimension: k products -> m numbers of the output.
template <int k, int m>
void transform_products(const Vec* x, Vec* y) {
  for (int i = 0; i < m; i++) {
    y[i] = i % 2 ? x[1] - x[2] : x[1] + x[2];
    if constexpr (k == 6) y[i] += float(1 << i) * (i % 2 ? x[3] - x[4] : x[3] + x[4]);
  }
  y[0] += x[0];
  y[m - 1] += x[k - 1];
}

// A in one dimension: gradients of m numbers of the output -> k.
template <int k, int m>
void transform_gradient(const Vec* x, Vec* y) {
  y[0] = x[0];
  for (int point = 1; point < k / 2; point++) {
    Vec even = {}, odd = {};
    for (int i = 0; i < m; i++) {
      const float power = point == 1 ? 1 : 1 << i;
      i % 2 ? odd += power * x[i] : even += power * x[i];
    }
    y[2 * point - 1] = even + odd;
    y[2 * point] = even - odd;
  }
  y[k - 1] = x[m - 1];
}

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

// Call f(image, top, left, tile, channel) for every m x m tile of images (n, h, w) and every eight
// channels. The last tiles may reach beyond the image; the last channels may come twice.
template <class F>
void for_each_tile(int64_t n, int64_t h, int64_t w, int64_t c, int64_t m, const F& f) {
  const int64_t rows = (h + m - 1) / m, columns = (w + m - 1) / m;
  at::parallel_for(0, n * rows * columns, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t channel = 0; channel < c; channel += LANES)
        f(t / (rows * columns), t / columns % rows * m, t % columns * m, t,
          std::min(channel, c - LANES));
  });
}

// Transform tiles of I x I pixels of x, zero outside: (N, H, W, C) -> (k * k, tiles, C).
template <int I, int k, void (*transform)(const Vec*, Vec*)>
Tensor to_tiles(const Tensor& x, int64_t m, int64_t padding) {
  const int64_t n = x.size(0), h = x.size(1), w = x.size(2), c = x.size(3);
  const int64_t out_h = h + 2 * padding - (I - m), out_w = w + 2 * padding - (I - m);
  const int64_t count = n * ((out_h + m - 1) / m) * ((out_w + m - 1) / m);
  const Tensor tiles = at::empty({k * k, count, c}, x.options());
  const float* source = x.data_ptr<float>();
  float* target = tiles.data_ptr<float>();
  for_each_tile(n, out_h, out_w, c, m, [=](int64_t image, int64_t top, int64_t left, int64_t t,
                                           int64_t channel) {
    Vec in[I][I], out[k][k];
    for (int i = 0; i < I; i++)
      for (int j = 0; j < I; j++) {
        const int64_t y = top - padding + i, z = left - padding + j;
        const float* pixel = source + ((image * h + y) * w + z) * c + channel;
        in[i][j] = y >= 0 && y < h && z >= 0 && z < w ? *(const Vec*)pixel : Vec{};
      }
    transform_tile<I, k, transform>(in, out);
    for (int i = 0; i < k * k; i++)
      *(Vec*)(target + (i * count + t) * c + channel) = out[i / k][i % k];
  });
  return tiles;
}

// Transform products to the output: (k * k, tiles, C) -> (N, H, W, C).
template <int k, int m>
Tensor to_output(const Tensor& products, int64_t n, int64_t h, int64_t w) {
  const int64_t c = products.size(2), count = products.size(1);
  const Tensor output = at::empty({n, h, w, c}, products.options());
  const float* source = products.data_ptr<float>();
  float* target = output.data_ptr<float>();
  for_each_tile(n, h, w, c, m, [=](int64_t image, int64_t top, int64_t left, int64_t t,
                                   int64_t channel) {
    Vec in[k][k], out[m][m];
    for (int i = 0; i < k * k; i++)
      in[i / k][i % k] = *(const Vec*)(source + (i * count + t) * c + channel);
    transform_tile<k, m, transform_products<k, m>>(in, out);
    for (int i = 0; i < std::min<int64_t>(m, h - top); i++)
      for (int j = 0; j < std::min<int64_t>(m, w - left); j++)
        *(Vec*)(target + ((image * h + top + i) * w + left + j) * c + channel) = out[i][j];
  });
  return output;
}

Tensor input_tiles(const Tensor& x, int64_t k, int64_t r, int64_t padding) {
  const int64_t m = k - r + 1;
  return k == 6 ? to_tiles<6, 6, transform_input<6>>(x, m, padding)
                : to_tiles<4, 4, transform_input<4>>(x, m, padding);
}

Tensor gradient_tiles(const Tensor& grad, int64_t k, int64_t r) {
  switch (10 * k + r) {
    case 62: return to_tiles<5, 6, transform_gradient<6, 5>>(grad, 5, 0);
    case 63: return to_tiles<4, 6, transform_gradient<6, 4>>(grad, 4, 0);
    case 42: return to_tiles<3, 4, transform_gradient<4, 3>>(grad, 3, 0);
    default: return to_tiles<2, 4, transform_gradient<4, 2>>(grad, 2, 0);
  }
}

Tensor output(const Tensor& products, int64_t n, int64_t h, int64_t w, int64_t k, int64_t r) {
  switch (10 * k + r) {
    case 62: return to_output<6, 5>(products, n, h, w);
    case 63: return to_output<6, 4>(products, n, h, w);
    case 42: return to_output<4, 3>(products, n, h, w);
    default: return to_output<4, 2>(products, n, h, w);
  }
}

TORCH_LIBRARY(kn_zoo_winograd, library) {
  library.def("input_tiles(Tensor x, int k, int r, int padding) -> Tensor", &input_tiles);
  library.def("gradient_tiles(Tensor grad, int k, int r) -> Tensor", &gradient_tiles);
  library.def("output(Tensor products, int n, int h, int w, int k, int r) -> Tensor", &output);
}
