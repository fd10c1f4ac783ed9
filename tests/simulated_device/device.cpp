// An accelerator in the CPU's memory, as torch's PrivateUse1 backend. See the docstring of the package.
//
// An operator is computed by the CPU's kernel on copies. Before that, its arguments are judged as a GPU would judge
// them: tensors of both devices, or a generator of the wrong one, are an error.

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/Operators.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <set>

#include "hardware.h"

namespace {

// Copies between the devices, and the same memory seen as the CPU's.

at::Tensor as_cpu(const at::Tensor& tensor) {
  auto options = tensor.options().device(c10::kCPU);
  at::Tensor seen = at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
  if (tensor.is_conj()) {
    seen = seen._conj();
  }
  return tensor.is_neg() ? seen._neg_view() : seen;
}

at::Tensor plain(const at::Tensor& tensor) {
  return tensor.device().type() == KIND ? as_cpu(tensor) : tensor;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  at::AutoDispatchBelowAutograd below;
  plain(to).copy_(plain(from));
  return to;
}

const at::Tensor& resize_sizes(
    const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto bytes = static_cast<size_t>(impl->storage_offset() + impl->numel()) * self.dtype().itemsize();
  if (impl->storage().nbytes() < bytes) {
    Hooks().resizePrivateUse1Bytes(impl->storage(), bytes);
  }
  if (format.has_value() && *format != c10::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) {
    resize_sizes(to, from.sizes(), std::optional<c10::MemoryFormat>());
  }
  return copy_from(from, to, false);
}

at::Tensor empty(
    c10::IntArrayRef size,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>,
    std::optional<c10::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) {
  return at::native::view(self, size);
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(self, size, stride, std::nullopt);
}

at::Tensor& set_storage(
    at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "set_: storage on ", source.device(), ", tensor on ", self.device());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_source(at::Tensor& self, c10::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

at::Tensor& set_empty(at::Tensor& self) {
  return set_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true), 0, {0}, {1});
}

at::Scalar local_scalar(const at::Tensor& self) {
  return at::_local_scalar_dense(as_cpu(self));
}

// The strict fallback.

bool is_among(const at::OperatorName& name, const char* const* names, size_t count) {
  return std::any_of(names, names + count, [&](const char* each) { return name.name == each; });
}

// `aten::add` for all of add.Tensor, add_.Tensor and add.out.
std::string base_name(const std::string& name) {
  return name.size() > 1 && name.back() == '_' && name[name.size() - 2] != '_' ? name.substr(0, name.size() - 1) : name;
}

// Operators that torch marks as element by element, which take a number that lies in the CPU's memory.
bool is_element_wise(const c10::OperatorHandle& op) {
  static const std::set<std::string> names = [] {
    std::set<std::string> found;
    for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
      const auto handle = c10::Dispatcher::singleton().findOp(name);
      if (handle.has_value() && handle->hasSchema() && handle->hasTag(at::Tag::pointwise)) {
        found.insert(base_name(name.name));
      }
    }
    return found;
  }();
  return names.count(base_name(op.operator_name().name)) > 0;
}

// Whether a GPU's kernel takes a number that lies in the CPU's memory.
bool takes_numbers(const c10::OperatorHandle& op) {
  static constexpr const char* WITH_VALUE[] = {
      "aten::masked_fill", "aten::masked_fill_", "aten::index_fill", "aten::index_fill_", "aten::fill_", "aten::fill",
      "aten::where", "aten::clamp", "aten::clamp_", "aten::clamp_min", "aten::clamp_max", "aten::searchsorted",
      "aten::bucketize", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  return is_element_wise(op) || is_among(op.operator_name(), WITH_VALUE, std::size(WITH_VALUE));
}

// Whether an argument may lie in the CPU's memory whatever its shape: the indices of index and index_put_.
bool takes_cpu(const c10::OperatorHandle& op, size_t position) {
  static constexpr const char* INDEXED[] = {
      "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
      "aten::_unsafe_index_put"};
  return position == 1 && is_among(op.operator_name(), INDEXED, std::size(INDEXED));
}

void check_tensor(const c10::OperatorHandle& op, const at::Tensor& tensor, size_t position) {
  if (!tensor.defined() || tensor.device().type() == KIND || takes_cpu(op, position)) {
    return;
  }
  const auto& argument = op.schema().arguments()[position];
  const bool is_written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  // a wrapped number stood in Python's code as one
  const bool is_python = tensor.unsafeGetTensorImpl()->is_wrapped_number();
  if (tensor.dim() == 0 && !is_written && (is_python || takes_numbers(op))) {
    return;
  }
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device: ", op.operator_name(), " has its argument '",
      argument.name(), "' on ", tensor.device(), " and others on ", DEVICE);
}

void check(const c10::OperatorHandle& op, const torch::jit::Stack& arguments) {
  for (size_t position = 0; position < arguments.size(); ++position) {
    const c10::IValue& value = arguments[position];
    if (value.isTensor()) {
      check_tensor(op, value.toTensor(), position);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) {
        check_tensor(op, tensor, position);
      }
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        check_tensor(op, tensor.value_or(at::Tensor()), position);
      }
    }
  }
}

// A generator of the device is replaced by the one inside, no generator by the device's own.
void put_generators(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  const size_t begin = stack.size() - arguments.size();
  for (size_t position = 0; position < arguments.size(); ++position) {
    const bool takes_generator = arguments[position].type()->str().find("Generator") != std::string::npos;
    if (!takes_generator) {
      continue;
    }
    c10::IValue& value = stack[begin + position];
    const at::Generator given = value.isNone() ? default_generator() : value.toGenerator();
    TORCH_CHECK(
        given.device().type() == KIND, "Expected a '", DEVICE.str(), "' device type for generator but found '",
        given.device().type(), "' in ", op.operator_name());
    value = static_cast<Random*>(given.unsafeGetGeneratorImpl())->inside();
  }
}

struct Quiet final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void strict_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  check(op, torch::jit::Stack(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end()));
  put_generators(op, *stack);
  // the CPU's kernels warn of outputs that they resize, which the code under test did not make
  static Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard without_warnings(&quiet);
  at::native::cpu_fallback(op, stack);
}

// Convolutions of a foreign backend come here.

at::Tensor convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    c10::IntArrayRef stride,
    c10::IntArrayRef padding,
    c10::IntArrayRef dilation,
    bool transposed,
    c10::IntArrayRef output_padding,
    int64_t groups) {
  TORCH_CHECK(input.device() == weight.device(), "Input type and weight type should be the same");
  std::optional<at::Tensor> added;
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK(bias->device() == weight.device(), "Input type and bias type should be the same");
    added = bias->cpu();
  }
  return at::convolution(
             input.cpu(), weight.cpu(), added, stride, padding, dilation, transposed, output_padding, groups)
      .to(DEVICE);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient,
    const at::Tensor& input,
    const at::Tensor& weight,
    c10::IntArrayRef stride,
    c10::IntArrayRef padding,
    c10::IntArrayRef dilation,
    bool transposed,
    c10::IntArrayRef output_padding,
    int64_t groups,
    std::array<bool, 3> wanted) {
  const std::vector<int64_t> bias{gradient.size(1)};
  auto [to_input, to_weight, to_bias] = at::convolution_backward(
      gradient.cpu(), input.cpu(), weight.cpu(), bias, stride, padding, dilation, transposed, output_padding, groups,
      wanted);
  auto moved = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(DEVICE) : tensor; };
  return {moved(to_input), moved(to_weight), moved(to_bias)};
}

// Its schema does not say that it writes the running statistics, so the fallback would not bring them back.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(
    const at::Tensor& input,
    const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& variance,
    bool training,
    double momentum,
    double epsilon) {
  auto seen = [](const std::optional<at::Tensor>& tensor) -> std::optional<at::Tensor> {
    if (!tensor.has_value() || !tensor->defined()) {
      return std::nullopt;
    }
    TORCH_CHECK(tensor->device() == DEVICE, "Expected all tensors to be on the same device: aten::native_batch_norm");
    return as_cpu(*tensor);
  };
  auto [output, saved_mean, saved_scale] = at::native_batch_norm(
      plain(input), seen(weight), seen(bias), seen(mean), seen(variance), training, momentum, epsilon);
  return {output.to(DEVICE), saved_mean.to(DEVICE), saved_scale.to(DEVICE)};
}

} // namespace

// The default generator, for the device's Python module.
TORCH_LIBRARY(simulated_device, m) {
  m.def("random_state", []() { return default_generator().get_state(); });
  m.def("set_random_state", [](const at::Tensor& state) {
    default_generator().unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
  });
  m.def("seed", [](int64_t seed) { default_generator().unsafeGetGeneratorImpl()->set_current_seed(seed); });
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&strict_fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("unfold", unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_sizes);
  m.impl("set_", set_empty);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_source);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("native_batch_norm", batch_norm);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

// The types that autocast computes in, as on any GPU.

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define IN_LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(IN_LOWER_PRECISION)
#define IN_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(IN_FLOAT)
#define IN_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(IN_WIDEST)
}
