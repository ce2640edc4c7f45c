// A device guard for "cuda" in a torch that was built without it, so that fake tensors may be there.
//
// torch's own `_ensureCUDADeviceGuardSet` does the same, but only in a torch that was built with CUDA. There is
// one device with one stream, and nothing ever runs on it.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceType;
using c10::Stream;

namespace {

const Device device(DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device); }
};

}  // namespace

extern "C" void set_guard(bool present) {
  static const Guard* guard = new Guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(present ? guard : nullptr);
}
