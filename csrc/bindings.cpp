// The launch functions as ops of torch, `torch.ops.dcgan_cuda.<name>`, over LibTorch's stable ABI.
//
// An op is its launch function: its schema is read off the C++ signature, so that the two cannot disagree.
//   const T*   Tensor          T*   Tensor(a!), written           Maybe<T>   the same, may be None
//   int64_t    int             double   float                     Stream (first)         torch's current stream
// and last comes `bool dependent=False`, whether it is a dependent launch.
// Ops check only devices and density: shapes, dtypes and alignment are checked by kernels/_cuda, their only caller.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "adam.h"
#include "batch_norm.h"
#include "common.h"
#include "conv.h"
#include "head.h"
#include "image.h"
#include "shares.h"

// Weak, so that a torch without CUDA can load the extension, for the tests; there it is null.
#pragma weak aoti_torch_get_current_cuda_stream

namespace {

using torch::stable::Tensor;

// How an argument of a launch function arrives from torch (`Held`), and what its schema says.
template <class T>
struct Argument;

template <>
struct Argument<int64_t> {
  using Held = int64_t;
  static int64_t pass(Held held) { return held; }
  static std::string schema(char) { return "int"; }
};

template <>
struct Argument<double> {
  using Held = double;
  static double pass(Held held) { return held; }
  static std::string schema(char) { return "float"; }
};

template <class T>
struct Argument<T*> {
  using Held = Tensor;
  static T* pass(const Held& held) { return static_cast<T*>(held.data_ptr()); }
  static std::string schema(char alias) {
    return std::is_const_v<T> ? "Tensor" : std::string("Tensor(") + alias + "!)";
  }
};

template <class T>
struct Argument<Maybe<T>> {
  using Held = std::optional<Tensor>;
  static Maybe<T> pass(const Held& held) { return {held ? static_cast<T*>(held->data_ptr()) : nullptr}; }
  static std::string schema(char alias) { return Argument<T*>::schema(alias) + "?"; }
};

// torch's current stream on a device. An extension that was linked against a torch without CUDA, and runs in one with
// it, finds the function in the library that torch has loaded.
cudaStream_t current_stream(const char* op, int32_t device) {
  static const auto get = [] {
    auto* found = &aoti_torch_get_current_cuda_stream;
    if (found) return found;
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<decltype(found)>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, op, " needs a torch with CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == AOTI_TORCH_SUCCESS, op, " got no stream of cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

// The device of an op's tensors, once all are known to be dense and on one GPU.
struct Device {
  const char* op;
  int32_t index = -1;

  void see(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), op, " got a tensor that is not on a CUDA device");
    STD_TORCH_CHECK(tensor.is_contiguous(), op, " got a tensor that is not contiguous");
    const auto found = tensor.get_device_index();
    STD_TORCH_CHECK(index < 0 || index == found, op, " got tensors on cuda:", index, " and cuda:", found);
    index = found;
  }
  void see(const std::optional<Tensor>& tensor) {
    if (tensor) see(*tensor);
  }
  void see(int64_t) {}
  void see(double) {}
};

template <auto Function>
struct Op;

template <class... A, cudaError_t (*Function)(Stream, A...)>
struct Op<Function> {
  static inline const char* name;

  // Called by torch with a stack of arguments, each of which it takes; leaves nothing.
  static void call(StableIValue* stack, uint64_t, uint64_t) { unpack(stack, std::index_sequence_for<A...>()); }

  template <size_t... I>
  static void unpack(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<typename Argument<A>::Held...> held{
        torch::stable::detail::to<typename Argument<A>::Held>(stack[I])...};
    const bool dependent = torch::stable::detail::to<bool>(stack[sizeof...(I)]);
    Device device{name};
    (device.see(std::get<I>(held)), ...);
    const torch::stable::accelerator::DeviceGuard guard(device.index);
    const Stream stream{current_stream(name, device.index), dependent};
    const auto error = Function(stream, Argument<A>::pass(std::get<I>(held))...);
    STD_TORCH_CHECK(error == cudaSuccess, name, " failed to launch: ", cudaGetErrorString(error));
  }

  // `names` are those of the arguments but the stream, separated by spaces.
  static void add(torch::stable::detail::StableLibrary& library, const char* op, std::string names) {
    name = op;
    std::string schema = std::string(op) + "(";
    char alias = 'a';
    size_t at = 0;
    for (const auto& type : {Argument<A>::schema(alias++)...}) {
      STD_TORCH_CHECK(at < names.size(), op, " has more arguments than names");
      const auto end = std::min(names.find(' ', at), names.size());
      schema += (at ? ", " : "") + type + " " + names.substr(at, end - at);
      at = end + 1;
    }
    STD_TORCH_CHECK(at > names.size(), op, " has more names than arguments");
    library.def((schema + ", bool dependent=False) -> ()").c_str());
  }
};

}  // namespace

// One line an op: its launch function, and the names of that one's arguments.
#define OPS(OP) \
  OP(bn_statistics, "y values counts dtype rows groups channels tile_rows") \
  OP(bn_merge_statistics, "values counts weight bias running_mean running_var tracked state groups tiles channels " \
      "eps momentum") \
  OP(bn_apply, "y state out dtype rows groups channels tile_rows slope") \
  OP(bn_activation_grad, "da y state g values dtype rows groups channels tile_rows slope") \
  OP(bn_merge_sums, "values dweight dbias means rows groups tiles channels") \
  OP(bn_apply_grad, "g y state means dy dtype rows groups channels tile_rows") \
  OP(head, "y weight state scale logits dlogits means ticket dtype per_group groups pixels channels real slope") \
  OP(head_grad, "y weight state dlogits g values dw dtype per_group groups pixels channels slope") \
  OP(gan_loss, "logits dlogits means dtype per_group groups real") \
  OP(image_conv, "x w y saved state values dtype images groups height width image_channels channels tanh slope") \
  OP(image_conv_transpose, "x w y saved dtype images height width image_channels channels tanh slope") \
  OP(conv_sm80, "x w y saved state values counts rounds round_counts tickets weight bias running_mean running_var " \
      "tracked dweight dbias merged transposed dtype images groups height width into out box_height box_width " \
      "columns slope eps momentum") \
  OP(conv_sm90, "x w y saved state values counts rounds round_counts tickets weight bias running_mean running_var " \
      "tracked dweight dbias merged transposed dtype images groups height width into out box_height box_width " \
      "columns cluster slope eps momentum") \
  OP(wgrad_sm90, "low high shares dtype images height width low_channels high_channels box_height box_width columns " \
      "cluster split") \
  OP(image_wgrad, "low high shares dtype images height width image_channels channels split") \
  OP(sum_shares, "shares gradient size split") \
  OP(adam, "table blocks step flags loss_scale programs copy_dtype step_is_float move_scale lr beta1 beta2 eps " \
      "growth backoff interval")

#define DEFINE(function, names) Op<function>::add(m, #function, names);
#define IMPLEMENT(function, names) m.impl(#function, Op<function>::call);

STABLE_TORCH_LIBRARY(dcgan_cuda, m) { OPS(DEFINE) }

// For every device: a CPU tensor then fails with a message of ours.
STABLE_TORCH_LIBRARY_IMPL(dcgan_cuda, CompositeExplicitAutograd, m) { OPS(IMPLEMENT) }
