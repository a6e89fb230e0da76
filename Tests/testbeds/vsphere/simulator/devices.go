package main

import (
	"fmt"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// assigned is a device of the host given to a machine; its kind says how.
type assigned struct {
	Kind      string  `json:"kind"` // device, dynamic, vgpu, dvx
	Vendor    uint16  `json:"vendor"`
	Device    uint16  `json:"device"`
	SubVendor uint16  `json:"subVendor"`
	SubDevice uint16  `json:"subDevice"`
	Address   string  `json:"address"`
	Name      string  `json:"deviceName"`
	Label     string  `json:"label"`
	Profile   string  `json:"profile"`
	more      []model // further ids a dynamic device may have
}

// VirtualPCIPassthroughDvxBackingInfo came with vSphere 8, after this govmomi.
type VirtualPCIPassthroughDvxBackingInfo struct {
	types.VirtualDeviceBackingInfo

	DeviceClass  string                  `xml:"deviceClass,omitempty"`
	ConfigParams []types.BaseOptionValue `xml:"configParams,omitempty,typeattr"`
}

func (w *world) addDevices(vm *simulator.VirtualMachine, m *machine, p place, store *simulator.Datastore) {
	add := func(device types.BaseVirtualDevice) {
		vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, device)
	}
	base := func(key, controller int32, unit *int32, label string) types.VirtualDevice {
		return types.VirtualDevice{
			Key: key, ControllerKey: controller, UnitNumber: unit, DeviceInfo: &types.Description{Label: label, Summary: label},
		}
	}
	unit := func(n int) *int32 {
		v := int32(n)
		return &v
	}
	controllerKey, first := int32(1000), int32(2000)
	scsi := func(label string) types.VirtualSCSIController {
		c := types.VirtualSCSIController{SharedBus: types.VirtualSCSISharingNoSharing, ScsiCtlrUnitNumber: 7}
		c.VirtualDevice = base(controllerKey, 100, unit(3), label)
		return c
	}
	switch m.Controller {
	case "lsilogic":
		add(&types.VirtualLsiLogicController{VirtualSCSIController: scsi("SCSI controller 0")})
	case "lsisas":
		add(&types.VirtualLsiLogicSASController{VirtualSCSIController: scsi("SCSI controller 0")})
	case "buslogic":
		add(&types.VirtualBusLogicController{VirtualSCSIController: scsi("SCSI controller 0")})
	case "sata":
		controllerKey, first = 15000, 16000
		c := &types.VirtualAHCIController{}
		c.VirtualDevice = base(controllerKey, 100, unit(24), "SATA controller 0")
		add(c)
	case "nvme":
		controllerKey, first = 31000, 32000
		c := &types.VirtualNVMEController{}
		c.VirtualDevice = base(controllerKey, 100, unit(30), "NVME controller 0")
		add(c)
	case "ide":
		controllerKey, first = 200, 3000
		if len(m.Disks) > 2 {
			m.Disks = m.Disks[:2]
		}
	default:
		add(&types.ParaVirtualSCSIController{VirtualSCSIController: scsi("SCSI controller 0")})
	}
	cd := &types.VirtualCdrom{VirtualDevice: base(3002, 201, unit(0), "CD/DVD drive 1")}
	cd.Backing = &types.VirtualCdromIsoBackingInfo{VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{
		FileName: datastorePath(store.Name, "iso/install & rescue.iso")}}
	cd.Connectable = &types.VirtualDeviceConnectInfo{StartConnected: false, Connected: false, AllowGuestControl: true}
	add(cd)

	for n := range m.Disks {
		add(w.disk(vm, m, p, store, n, base(first+int32(n), controllerKey, unit(n), fmt.Sprintf("Hard disk %d", n+1))))
	}
	for n := range m.NICs {
		w.nic(vm, m, p, n, base(int32(4000+n), 100, unit(7+n), fmt.Sprintf("Network adapter %d", n+1)), add)
	}
	if m.TPM {
		add(&types.VirtualTPM{VirtualDevice: base(11000, 100, nil, "Virtual TPM")})
	}
	if m.usb {
		c := &types.VirtualUSBXHCIController{}
		c.VirtualDevice = base(14000, 100, unit(23), "USB xHCI controller")
		add(c)
		stick := &types.VirtualUSB{VirtualDevice: base(15500, 14000, nil, "USB 1"), Vendor: 0x0781, Product: 0x5581, Connected: true}
		stick.Backing = &types.VirtualUSBUSBBackingInfo{VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: "path:1/0/1"}}
		add(stick)
	}
	if m.serial {
		port := &types.VirtualSerialPort{VirtualDevice: base(9000, 400, unit(0), "Serial port 1")}
		port.Backing = &types.VirtualSerialPortPipeBackingInfo{
			VirtualDevicePipeBackingInfo: types.VirtualDevicePipeBackingInfo{PipeName: "/tmp/com & co"}, Endpoint: "server"}
		add(port)
	}
	for n, a := range m.Assigned {
		device := &types.VirtualPCIPassthrough{VirtualDevice: base(int32(13000+n), 100, unit(18+n), fmt.Sprintf("PCI device %d", n))}
		device.Backing = a.backing(p.host.Hardware.SystemInfo.Uuid, vm.Runtime.PowerState, m.powered)
		add(device)
	}
}

func (w *world) disk(
	vm *simulator.VirtualMachine, m *machine, p place, store *simulator.Datastore, n int, device types.VirtualDevice,
) types.BaseVirtualDevice {
	spec := &m.Disks[n]
	on := store
	if spec.stream == "" && w.random.Intn(5) == 0 {
		on = p.datastores[w.random.Intn(len(p.datastores))]
	}
	suffix := ""
	if n > 0 {
		suffix = fmt.Sprintf("_%d", n)
	}
	d := &disk{
		vm: vm.Self, name: m.Name, leaseKey: fmt.Sprintf("%s:%d", controllerName(m.Controller), n), datastore: on.Name,
		datastoreURL: on.Summary.Url, path: m.directory() + "/" + m.directory() + suffix + ".vmdk", capacity: spec.capacity,
		seed: w.random.Int63(), store: w.store,
	}
	if spec.stream != "" {
		d.stream, d.raw = spec.stream, spec.stream[:len(spec.stream)-len(".vmdk")]+".raw"
		if capacity, err := streamCapacity(spec.stream); err == nil {
			d.capacity = capacity
		}
	}
	w.disks[vm.Self.Value] = append(w.disks[vm.Self.Value], d)
	place := types.VirtualDeviceFileBackingInfo{FileName: datastorePath(on.Name, d.path), Datastore: &on.Self}
	id := seededUUID(w.random)
	if spec.rdm != "" {
		device.Backing = &types.VirtualDiskRawDiskMappingVer1BackingInfo{
			VirtualDeviceFileBackingInfo: place, LunUuid: "0200" + id, DeviceName: "naa." + id[:8], CompatibilityMode: spec.rdm,
			DiskMode: spec.Mode, Uuid: id,
		}
	} else {
		backing := &types.VirtualDiskFlatVer2BackingInfo{
			VirtualDeviceFileBackingInfo: place, DiskMode: spec.Mode, ThinProvisioned: yes(spec.Thin), WriteThrough: yes(false),
			Split: yes(false), Uuid: id, Sharing: "sharingNone", DigestEnabled: yes(false),
		}
		if spec.sharing != "" {
			backing.Sharing = spec.sharing
		}
		if m.snapshots > 0 && spec.Mode == "persistent" {
			parent := *backing
			backing.Parent = &parent
			backing.FileName = datastorePath(on.Name, m.directory()+"/"+m.directory()+suffix+"-000001.vmdk")
		}
		if m.encrypted {
			backing.KeyId = vm.Config.KeyId
		}
		device.Backing = backing
	}
	attach(vm, on)
	return &types.VirtualDisk{VirtualDevice: device, CapacityInKB: d.capacity / 1024, CapacityInBytes: d.capacity, DiskObjectId: fmt.Sprintf("%s-%d", vm.Self.Value, 2000+n)}
}

func controllerName(kind string) string {
	switch kind {
	case "lsilogic":
		return "VirtualLsiLogicController0"
	case "lsisas":
		return "VirtualLsiLogicSASController0"
	case "buslogic":
		return "VirtualBusLogicController0"
	case "sata":
		return "VirtualAHCIController0"
	case "nvme":
		return "VirtualNVMEController0"
	case "ide":
		return "VirtualIDEController0"
	}
	return "ParaVirtualSCSIController0"
}

// attach notes that a machine uses a datastore.
func attach(vm *simulator.VirtualMachine, store *simulator.Datastore) {
	simulator.Map.AddReference(vm, &vm.Datastore, store.Self)
	simulator.Map.AddReference(store, &store.Vm, vm.Self)
}

func (w *world) nic(vm *simulator.VirtualMachine, m *machine, p place, n int, device types.VirtualDevice, add func(types.BaseVirtualDevice)) {
	spec := &m.NICs[n]
	networks := p.networks
	id := networks[spec.network%len(networks)]
	for _, candidate := range networks {
		if spec.Network != "" && networkName(candidate) == spec.Network {
			id = candidate
		}
	}
	spec.Network = networkName(id)
	kind := "assigned"
	if spec.Mac != "" {
		kind = "manual"
	} else {
		spec.Mac = fmt.Sprintf("00:50:56:%02x:%02x:%02x", w.random.Intn(64), w.random.Intn(256), w.random.Intn(256))
	}
	if group, ok := simulator.Map.Get(id).(*simulator.DistributedVirtualPortgroup); ok {
		device.Backing = &types.VirtualEthernetCardDistributedVirtualPortBackingInfo{Port: types.DistributedVirtualSwitchPortConnection{
			SwitchUuid: "50 2e 5a 3c 90 11 22 33-44 55 66 77 88 99 aa bb", PortgroupKey: group.Key, PortKey: fmt.Sprint(n)}}
		simulator.Map.AddReference(group, &group.Vm, vm.Self)
	} else {
		device.Backing = &types.VirtualEthernetCardNetworkBackingInfo{
			VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: spec.Network}, Network: &id}
	}
	simulator.Map.AddReference(vm, &vm.Network, id)
	connected := m.powered == types.VirtualMachinePowerStatePoweredOn
	device.Connectable = &types.VirtualDeviceConnectInfo{StartConnected: w.random.Intn(10) > 0, Connected: connected, AllowGuestControl: true}
	card := types.VirtualEthernetCard{VirtualDevice: device, AddressType: kind, MacAddress: spec.Mac, WakeOnLanEnabled: yes(true)}
	switch spec.Model {
	case "e1000":
		add(&types.VirtualE1000{VirtualEthernetCard: card})
	case "e1000e":
		add(&types.VirtualE1000e{VirtualEthernetCard: card})
	default:
		add(&types.VirtualVmxnet3{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: card}})
	}
}

// runsOnHostDevice tells whether a machine runs with a DirectPath device: vSphere makes no snapshot of it then.
func runsOnHostDevice(vm *simulator.VirtualMachine) bool {
	if vm.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn {
		return false
	}
	for _, device := range vm.Config.Hardware.Device {
		switch device := device.(type) {
		case *types.VirtualSriovEthernetCard:
			return true
		case *types.VirtualPCIPassthrough:
			if _, ok := device.Backing.(*types.VirtualPCIPassthroughVmiopBackingInfo); !ok {
				return true
			}
		}
	}
	return false
}
