// csrc/cpu/matrix.h against plain loops, with odd strides and NaN around the operands: `primitive SEED`. Values are
// small integers, so that sums are exact in any order. Prints differences; returns 0 if there are none.
#include "cpu/matrix.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <random>
#include <string>
#include <vector>

using namespace dk::DK_ISA;
using Generator = std::mt19937;

static int uniform(Generator& random, int low, int high) { return std::uniform_int_distribution<>(low, high)(random); }

template <int M, int N> static int check(int pairs, bool add, Generator& random) {
  const int rows = 16 * M, columns = 16 * N, k = 2 * pairs;
  const int lda = k + 2 * uniform(random, 0, 20), ldb = columns + uniform(random, 0, 20),
            ldc = columns + uniform(random, 0, 20);
  std::vector<BFloat16> a(rows * lda, BFloat16{0x7fc0});
  std::vector<uint32_t> b(pairs * ldb, 0x7fc07fc0);
  std::vector<float> c(rows * ldc, -1), expected = c;
  std::vector<int> left(rows * k), right(k * columns);
  for (int& x : left) x = uniform(random, -99, 99);
  for (int& x : right) x = uniform(random, -99, 99);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < k; ++j) from_float(left[i * k + j], &a[i * lda + j]);
  for (int j = 0; j < k; ++j)
    for (int n = 0; n < columns; ++n)
      from_float(right[j * columns + n], reinterpret_cast<BFloat16*>(&b[j / 2 * ldb + n]) + j % 2);
  for (int i = 0; i < rows; ++i)
    for (int n = 0; n < columns; ++n) {
      int sum = uniform(random, -999, 999);
      c[i * ldc + n] = sum;
      sum *= add;
      for (int j = 0; j < k; ++j) sum += left[i * k + j] * right[j * columns + n];
      expected[i * ldc + n] = sum;
    }
  multiply<M, N>(a.data(), lda, b.data(), ldb, c.data(), ldc, pairs, add);
  if (c == expected) return 0;
  printf("wrong product of %d x %d x %d\n", rows, columns, k);
  return 1;
}

int main(int, char** arguments) {
  syscall(SYS_arch_prctl, 0x1023, 18);   // permission to use tiles; fails, harmlessly, without AMX
  Generator random(std::stoul(arguments[1]));
  const MatrixUnit unit;
  int wrong = 0;
  for (int pairs : {16, 32, 64})
    for (bool add : {false, true})
      wrong += check<2, 2>(pairs, add, random) + check<4, 2>(pairs, add, random) + check<2, 8>(pairs, add, random);
  return wrong;
}
