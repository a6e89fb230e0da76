package main

import (
	"context"
	"fmt"
	"net/url"
	"strconv"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// model is a PCI device as sold.
type model struct {
	vendor, device, subVendor, subDevice uint16
	class                                uint16
	vendorName, name                     string
	memoryKB                             int64
	graphics                             string // HostGraphicsInfo.graphicsType, empty: no GPU
}

var (
	a100    = model{0x10de, 0x20b5, 0x10de, 0x1533, 0x0302, "NVIDIA Corporation", "GA100 [A100 PCIe 80GB]", 80 << 20, "direct"}
	l40s    = model{0x10de, 0x26b9, 0x10de, 0x1851, 0x0302, "NVIDIA Corporation", "AD102GL [L40S]", 48 << 20, "sharedDirect"}
	t4      = model{0x10de, 0x1eb8, 0x10de, 0x12a2, 0x0302, "NVIDIA Corporation", "TU104GL [Tesla T4]", 16 << 20, "shared"}
	quadro  = model{0x10de, 0x2231, 0x10de, 0x147e, 0x0300, "NVIDIA Corporation", "GA102GL [RTX A5000]", 24 << 20, "direct"}
	mi210   = model{0x1002, 0x740f, 0x1002, 0x0c34, 0x0380, "Advanced Micro Devices, Inc. [AMD/ATI]", "Aldebaran/MI200 [Instinct MI210]", 64 << 20, "direct"}
	flex    = model{0x8086, 0x56c0, 0x8086, 0x4905, 0x0380, "Intel Corporation", "Data Center GPU Flex 170", 16 << 20, "basic"}
	audio   = model{0x10de, 0x1aef, 0x10de, 0x147e, 0x0403, "NVIDIA Corporation", "GA102 High Definition Audio Controller", 0, ""}
	connect = model{0x15b3, 0x101d, 0x15b3, 0x0016, 0x0200, "Mellanox Technologies", "MT2892 Family [ConnectX-6 Dx]", 0, ""}
	p4510   = model{0x8086, 0x0a54, 0x8086, 0x4702, 0x0108, "Intel Corporation", "NVMe DC SSD [P4510]", 0, ""}
	fpga    = model{0x10ee, 0x5004, 0x10ee, 0x000e, 0x1200, "Xilinx & Co.", "Alveo U250", 0, ""}
	hosted  = [][]model{
		{a100, a100, connect, p4510}, {l40s, l40s, t4, connect}, {quadro, audio, mi210, fpga}, {flex, p4510}, {},
		{a100, l40s, mi210}, {connect}, {t4, t4}, {}, {quadro, audio},
	}
)

// equipHost gives a host its PCI devices and what it says about its graphics.
func (w *world) equipHost(host *simulator.HostSystem, n int) {
	info := *host.Hardware
	info.PciDevice = []types.HostPciDevice{
		{Id: "0000:00:00.0", ClassId: 0x0600, VendorId: signed(0x8086), DeviceId: 0x2020, SubVendorId: signed(0x8086), VendorName: "Intel Corporation", DeviceName: "Sky Lake-E DMI3 Registers"},
	}
	graphics := []types.HostGraphicsInfo{}
	profiles := []string{}
	for slot, m := range hosted[n%len(hosted)] {
		bus := byte(0x3a + 0x2f*slot)
		bridge := fmt.Sprintf("0000:%02x:00.0", bus)
		id := fmt.Sprintf("0000:%02x:00.0", bus+1)
		function := byte(0)
		if m.class == audio.class {
			// The sound of the card before it: the same slot, function 1.
			last := info.PciDevice[len(info.PciDevice)-1]
			bus, bridge, id, function = last.Bus-1, last.ParentBridge, last.Id[:len(last.Id)-1]+"1", 1
		} else {
			info.PciDevice = append(info.PciDevice, types.HostPciDevice{
				Id: bridge, Bus: bus, ClassId: 0x0604, VendorId: signed(0x8086), DeviceId: 0x2030, VendorName: "Intel Corporation", DeviceName: "Sky Lake-E PCI Express Root Port A",
			})
		}
		info.PciDevice = append(info.PciDevice, types.HostPciDevice{
			Id: id, Bus: bus + 1, Function: function, ClassId: int16(m.class), VendorId: signed(m.vendor), DeviceId: signed(m.device),
			SubVendorId: signed(m.subVendor), SubDeviceId: signed(m.subDevice), VendorName: m.vendorName, DeviceName: m.name, ParentBridge: bridge,
		})
		if m.graphics != "" {
			graphics = append(graphics, types.HostGraphicsInfo{
				DeviceName: m.name, VendorName: m.vendorName, PciId: id, GraphicsType: m.graphics, MemorySizeInKB: m.memoryKB,
			})
		}
		if m.graphics == "sharedDirect" {
			profiles = []string{"grid_l40s-1q", "grid_l40s-8q", "grid_l40s-48c"}
		}
	}
	info.SystemInfo.Uuid = seededUUID(w.random)
	host.Summary.Hardware.Uuid = info.SystemInfo.Uuid
	host.Hardware = &info
	host.Config.GraphicsInfo = graphics
	host.Config.SharedPassthruGpuTypes = profiles
}

func signed(id uint16) int16 { return int16(id) }

func (w *world) randomDevices(m *machine, host *simulator.HostSystem) {
	r := w.random
	m.Locked = true
	m.Extra["pciPassthru.use64bitMMIO"] = "TRUE"
	m.Extra["pciPassthru.64bitMMIOSizeGB"] = strconv.Itoa(64 << r.Intn(4))
	if r.Intn(2) == 0 {
		m.Extra["hypervisor.cpuid.v0"] = "FALSE"
	}
	devices := []model{a100, l40s, t4, quadro, mi210, flex, connect, p4510, fpga}
	for n := 0; n <= r.Intn(3); n++ {
		d := devices[r.Intn(len(devices))]
		a := assigned{
			Kind: "device", Vendor: d.vendor, Device: d.device, SubVendor: d.subVendor, SubDevice: d.subDevice, Name: d.name,
			Address: fmt.Sprintf("0000:%02x:00.0", 0x3b+0x2f*r.Intn(4)),
		}
		prefix := fmt.Sprintf("pciPassthru%d.", n)
		m.Extra[prefix+"present"] = "TRUE"
		m.Extra[prefix+"pciSlotNumber"] = strconv.Itoa(256 + 32*n)
		switch r.Intn(6) {
		case 0, 1:
			a.Kind = "dynamic"
			a.Label = []string{"", "ml & render"}[r.Intn(2)]
			a.more = []model{devices[r.Intn(6)]}
		case 2:
			a.Kind, a.Profile = "vgpu", []string{"grid_a100-40c", "grid_l40s-8q", "grid_t4-16q", "grid_p40-1b"}[r.Intn(4)]
			m.Extra[prefix+"cfg.enable_uvm"] = "1"
			m.Extra[prefix+"cfg.frame_rate_limiter"] = "0"
			m.Extra[prefix+"cfg.gpu-pci-id"] = "00:3b:00.0"
		case 3:
			a.Kind = "dvx"
		default:
			m.Extra[prefix+"msiEnabled"] = "FALSE"
			// Mostly one the host has; else one it had.
			if there := host.Hardware.PciDevice[r.Intn(len(host.Hardware.PciDevice))]; there.ClassId>>8 != 0x06 {
				a.Vendor, a.Device, a.Name, a.Address = uint16(there.VendorId), uint16(there.DeviceId), there.DeviceName, there.Id
			}
		}
		m.Assigned = append(m.Assigned, a)
	}
}

func (a assigned) backing(systemID string, _, powered types.VirtualMachinePowerState) types.BaseVirtualDeviceBackingInfo {
	named := types.VirtualDeviceDeviceBackingInfo{DeviceName: a.Name}
	switch a.Kind {
	case "dynamic":
		named.DeviceName = ""
		b := &types.VirtualPCIPassthroughDynamicBackingInfo{VirtualDeviceDeviceBackingInfo: named, CustomLabel: a.Label}
		allow := func(vendor, device, subVendor, subDevice uint16) {
			b.AllowedDevice = append(b.AllowedDevice, types.VirtualPCIPassthroughAllowedDevice{
				VendorId: int32(vendor), DeviceId: int32(device), SubVendorId: int32(subVendor), SubDeviceId: int32(subDevice), RevisionId: 0xa1})
		}
		allow(a.Vendor, a.Device, a.SubVendor, a.SubDevice)
		for _, m := range a.more {
			allow(m.vendor, m.device, 0, 0)
		}
		if powered == types.VirtualMachinePowerStatePoweredOn {
			b.AssignedId = a.Address
		}
		return b
	case "vgpu":
		return &types.VirtualPCIPassthroughVmiopBackingInfo{Vgpu: a.Profile}
	case "dvx":
		return &VirtualPCIPassthroughDvxBackingInfo{
			DeviceClass: "com.example.npu & co", ConfigParams: []types.BaseOptionValue{&types.OptionValue{Key: "slices", Value: "4"}}}
	}
	return &types.VirtualPCIPassthroughDeviceBackingInfo{
		VirtualDeviceDeviceBackingInfo: named, Id: a.Address, DeviceId: strconv.Itoa(int(signed(a.Device))), SystemId: systemID, VendorId: signed(a.Vendor),
	}
}

func networkName(id ref) string {
	switch network := simulator.Map.Get(id).(type) {
	case *simulator.DistributedVirtualPortgroup:
		return network.Name
	case *mo.Network:
		return network.Name
	}
	return ""
}

// attachTags makes categories and tags over REST, as a person would, and gives them to a third of the machines.
func (w *world) attachTags(address *url.URL) error {
	ctx := context.Background()
	client, err := govmomi.NewClient(ctx, address, true)
	if err != nil {
		return err
	}
	defer func() { _ = client.Logout(ctx) }()
	api := rest.NewClient(client.Client)
	if err := api.Login(ctx, address.User); err != nil {
		return err
	}
	defer func() { _ = api.Logout(ctx) }()
	manager := tags.NewManager(api)
	var all []string
	for _, category := range []string{"Environment", "Kostenstelle & Team"} {
		id, err := manager.CreateCategory(ctx, &tags.Category{Name: category, Cardinality: "MULTIPLE", AssociableTypes: []string{"VirtualMachine"}})
		if err != nil {
			return err
		}
		for _, name := range []string{"production", "Größe-L"} {
			tag, err := manager.CreateTag(ctx, &tags.Tag{Name: name + " (" + category + ")", CategoryID: id})
			if err != nil {
				return err
			}
			all = append(all, tag)
		}
	}
	attached := 0
	for n, vm := range entities("VirtualMachine") {
		if n%3 != 0 || attached == 200 {
			continue
		}
		attached++
		if err := manager.AttachTag(ctx, all[n/3%len(all)], vm); err != nil {
			return err
		}
	}
	return nil
}
