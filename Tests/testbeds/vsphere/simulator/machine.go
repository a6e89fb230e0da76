package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// machine describes a virtual machine, random or read from a machine.json.
type machine struct {
	Name           string            `json:"name"`
	GuestID        string            `json:"guestId"`
	Annotation     string            `json:"annotation"`
	Folder         string            `json:"folder"`
	Efi            bool              `json:"efi"`
	SecureBoot     bool              `json:"secureBoot"`
	TPM            bool              `json:"tpm"`
	CPUs           int32             `json:"cpus"`
	CoresPerSocket int32             `json:"coresPerSocket"`
	MemoryMB       int32             `json:"memoryMB"`
	Locked         bool              `json:"memoryLocked"`
	UUID           string            `json:"uuid"`
	InstanceUUID   string            `json:"instanceUuid"`
	Controller     string            `json:"controller"` // pvscsi, lsilogic, lsisas, buslogic, sata, nvme, ide
	NICs           []machineNIC      `json:"nics"`
	Assigned       []assigned        `json:"devices"`
	Extra          map[string]string `json:"extraConfig"`
	Disks          []machineDisk     `json:"disks"` // without content of their own: random
	PoweredOn      bool              `json:"poweredOn"`

	powered   types.VirtualMachinePowerState
	tracking  bool
	encrypted bool
	hotAdd    bool
	snapshots int
	tools     bool
	datastore int
	folder    int
	version   int
	usb       bool
	serial    bool
	tags      []string
}

type machineNIC struct {
	Network string `json:"network"`
	Mac     string `json:"mac"`
	Model   string `json:"model"`
	network int
}

type machineDisk struct {
	Mode       string `json:"mode"`
	Thin       bool   `json:"thin"`
	CapacityMB int64  `json:"capacityMB"`
	stream     string
	// sharing "sharingMultiWriter", rdm "physicalMode"
	sharing  string
	rdm      string
	capacity int64
}

// directory is the machine's folder in a datastore: vSphere takes the name, with what a path can't hold escaped.
func (m *machine) directory() string { return m.Name }

var (
	stems  = []string{"web", "db", "Büro-PC", "R&D render", "机器学习", "app <test>", "train \"A\"", "größe", "win & sql", "edge%2fnode"}
	guests = []string{"ubuntu64Guest", "debian11_64Guest", "rhel8_64Guest", "windows9Server64Guest", "otherGuest64", "sles15_64Guest"}
)

func (w *world) randomMachine(n int, p place) *machine {
	r := w.random
	chance := func(percent int) bool { return r.Intn(100) < percent }
	m := &machine{
		Name: fmt.Sprintf("%s %d", stems[n%len(stems)], n), GuestID: guests[r.Intn(len(guests))], Efi: chance(50),
		CPUs: int32(1) << r.Intn(6), MemoryMB: int32(512) << r.Intn(8), powered: types.VirtualMachinePowerStatePoweredOff,
		tracking: chance(30), hotAdd: chance(20), tools: chance(60), datastore: r.Intn(8), folder: r.Intn(3), version: 13 + r.Intn(7),
		Extra: map[string]string{"nvram": "machine.nvram", "svga.present": "TRUE"}, usb: chance(10), serial: chance(10),
	}
	m.CoresPerSocket = int32(1) << r.Intn(3)
	for m.CPUs%m.CoresPerSocket != 0 {
		m.CoresPerSocket /= 2
	}
	m.SecureBoot = m.Efi && chance(40)
	m.TPM = m.Efi && chance(15)
	m.encrypted = m.TPM || chance(4)
	if chance(25) {
		m.Annotation = "Owner: Team <A> & B\nzweite Zeile: äöü 测试"
	}
	switch r.Intn(5) {
	case 0, 1:
		m.powered = types.VirtualMachinePowerStatePoweredOn
	case 2:
		if chance(20) {
			m.powered = types.VirtualMachinePowerStateSuspended
		}
	}
	if chance(15) {
		m.snapshots = 1 + r.Intn(3)
	}
	m.Controller = []string{"pvscsi", "pvscsi", "lsilogic", "lsisas", "buslogic", "sata", "nvme", "ide"}[r.Intn(8)]
	for count := 1 + r.Intn(4); count > 0; count-- {
		d := machineDisk{Mode: "persistent", Thin: chance(60), capacity: (int64(16) << r.Intn(9)) << 20}
		switch r.Intn(25) {
		case 0:
			d.Mode = "independent_persistent"
		case 1:
			d.Mode = "independent_nonpersistent"
		case 2:
			d.sharing = "sharingMultiWriter"
		case 3:
			d.rdm = "physicalMode"
		case 4:
			d.rdm = "virtualMode"
		}
		m.Disks = append(m.Disks, d)
	}
	for count := r.Intn(4); count > 0; count-- {
		m.NICs = append(m.NICs, machineNIC{network: r.Intn(8), Model: []string{"vmxnet3", "vmxnet3", "e1000e", "e1000"}[r.Intn(4)]})
	}
	if chance(35) {
		w.randomDevices(m, p.host)
	}
	return m
}

// streamCapacity reads the size of the disk in a streamOptimized VMDK.
func streamCapacity(path string) (int64, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	head := make([]byte, 20)
	if _, err := io.ReadFull(file, head); err != nil {
		return 0, err
	}
	if string(head[:4]) != "KDMV" {
		return 0, fmt.Errorf("%s is no VMDK", path)
	}
	return int64(binary.LittleEndian.Uint64(head[12:])) * sector, nil
}

func seededUUID(r *rand.Rand) string {
	var b [16]byte
	_, _ = r.Read(b[:])
	id, _ := uuid.FromBytes(b[:])
	return id.String()
}

func yes(v bool) *bool { return &v }

func (w *world) configure(vm *simulator.VirtualMachine, m *machine, p place, store *simulator.Datastore) {
	r := w.random
	c := vm.Config
	if m.UUID == "" {
		m.UUID = seededUUID(r)
	}
	if m.InstanceUUID == "" {
		m.InstanceUUID = seededUUID(r)
	}
	c.Uuid, c.InstanceUuid, c.GuestId, c.Annotation = m.UUID, m.InstanceUUID, m.GuestID, m.Annotation
	c.GuestFullName = "Guest of type " + m.GuestID
	c.Firmware = "bios"
	if m.Efi {
		c.Firmware = "efi"
	}
	c.BootOptions = &types.VirtualMachineBootOptions{EfiSecureBootEnabled: yes(m.SecureBoot)}
	if m.version == 0 {
		m.version = 17
	}
	c.Version = fmt.Sprint("vmx-", m.version)
	c.Hardware.NumCPU, c.Hardware.NumCoresPerSocket, c.Hardware.MemoryMB = m.CPUs, m.CoresPerSocket, m.MemoryMB
	c.CpuHotAddEnabled, c.CpuHotRemoveEnabled, c.MemoryHotAddEnabled = yes(m.hotAdd), yes(false), yes(m.hotAdd)
	c.ChangeTrackingEnabled = yes(m.tracking)
	c.MemoryReservationLockedToMax = yes(m.Locked)
	allocation := func(reservation int64, share int32) *types.ResourceAllocationInfo {
		limit := int64(-1)
		return &types.ResourceAllocationInfo{
			Reservation: &reservation, Limit: &limit, ExpandableReservation: yes(false),
			Shares: &types.SharesInfo{Shares: share, Level: types.SharesLevelNormal},
		}
	}
	reserved := int64(0)
	if m.Locked {
		reserved = int64(m.MemoryMB)
	}
	c.MemoryAllocation = allocation(reserved, m.MemoryMB*10)
	c.CpuAllocation = allocation(int64(r.Intn(3))*500, m.CPUs*1000)
	if m.encrypted {
		c.KeyId = &types.CryptoKeyId{KeyId: "key-" + m.UUID[:8], ProviderId: &types.KeyProviderId{Id: "kms & co"}}
	}
	keys := []types.BaseOptionValue{}
	names := []string{}
	for name := range m.Extra {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		keys = append(keys, &types.OptionValue{Key: name, Value: m.Extra[name]})
	}
	c.ExtraConfig = keys
	c.CreateDate = nil

	w.addDevices(vm, m, p, store)

	if m.powered == "" {
		m.powered = types.VirtualMachinePowerStatePoweredOff
	}
	vm.Runtime.PowerState = m.powered
	vm.Summary.Runtime = vm.Runtime
	vm.Summary.Config.Uuid, vm.Summary.Config.InstanceUuid = c.Uuid, c.InstanceUuid
	vm.Summary.Config.GuestId, vm.Summary.Config.GuestFullName = c.GuestId, c.GuestFullName
	vm.Summary.Config.NumCpu, vm.Summary.Config.MemorySizeMB = m.CPUs, m.MemoryMB
	w.guestState(vm, m)
	for n := 0; n < m.snapshots; n++ {
		vm.CreateSnapshotTask(&types.CreateSnapshot_Task{
			This: vm.Self, Name: fmt.Sprintf("vor Update & Test %d", n+1), Memory: false, Quiesce: n == 0,
		})
	}
}

// guestState is what VMware Tools report.
func (w *world) guestState(vm *simulator.VirtualMachine, m *machine) {
	g := vm.Guest
	g.GuestId, g.GuestFullName = m.GuestID, vm.Config.GuestFullName
	if !m.tools {
		return
	}
	g.ToolsVersion, g.ToolsVersionStatus2 = "12352", "guestToolsCurrent"
	g.GuestFamily = "linuxGuest"
	if strings.HasPrefix(m.GuestID, "windows") {
		g.GuestFamily = "windowsGuest"
	}
	g.ToolsStatus, g.ToolsRunningStatus = types.VirtualMachineToolsStatusToolsNotRunning, "guestToolsNotRunning"
	if m.powered != types.VirtualMachinePowerStatePoweredOn {
		return
	}
	g.ToolsStatus, g.ToolsRunningStatus = types.VirtualMachineToolsStatusToolsOk, "guestToolsRunning"
	g.HostName = fmt.Sprintf("guest-%d.example", w.random.Intn(1000))
	for n, nic := range m.NICs {
		v4, v6 := fmt.Sprintf("10.%d.%d.%d", n, w.random.Intn(250), 1+w.random.Intn(250)), fmt.Sprintf("fe80::250:56ff:fe%02x:%d", n, 1+w.random.Intn(9000))
		origin := []string{"manual", "dhcp"}[w.random.Intn(2)]
		global := fmt.Sprintf("2001:db8:%d::%s", n, strings.TrimPrefix(v6, "fe80::250:"))
		g.Net = append(g.Net, types.GuestNicInfo{
			Network: nic.Network, MacAddress: nic.Mac, Connected: true, DeviceConfigId: int32(4000 + n), IpAddress: []string{v4, v6, global},
			DnsConfig: &types.NetDnsConfigInfo{HostName: "guest", DomainName: "example", IpAddress: []string{"10.0.0.53"}},
			IpConfig: &types.NetIpConfigInfo{IpAddress: []types.NetIpConfigInfoIpAddress{
				{IpAddress: v4, PrefixLength: 24, Origin: origin, State: "preferred"},
				{IpAddress: v6, PrefixLength: 64, Origin: "linklayer", State: "unknown"},
				{IpAddress: global, PrefixLength: 64, Origin: origin, State: "preferred"},
			}},
		})
	}
	if len(g.Net) > 0 {
		g.IpAddress = g.Net[0].IpAddress[0]
		gateway := strings.Join(strings.Split(g.IpAddress, ".")[:3], ".") + ".1"
		route := func(network, gateway, device string) types.NetIpRouteConfigInfoIpRoute {
			return types.NetIpRouteConfigInfoIpRoute{
				Network: network, Gateway: types.NetIpRouteConfigInfoGateway{IpAddress: gateway, Device: device},
			}
		}
		// An IPv6 router has its link-local address, on the first card; the second card's is in its subnet.
		routes := []types.NetIpRouteConfigInfoIpRoute{route("0.0.0.0", gateway, "0"), route("::", "fe80::1", "0")}
		if len(g.Net) > 1 {
			routes = append(routes, route("::", "2001:db8:1::1", "1"))
		}
		g.IpStack = []types.GuestStackInfo{{
			DnsConfig:     &types.NetDnsConfigInfo{HostName: "guest", DomainName: "example", IpAddress: []string{"10.0.0.53"}},
			IpRouteConfig: &types.NetIpRouteConfigInfo{IpRoute: routes},
		}}
	}
	vm.Summary.Guest.HostName, vm.Summary.Guest.IpAddress, vm.Summary.Guest.ToolsStatus = g.HostName, g.IpAddress, g.ToolsStatus
	now := time.Now()
	vm.Runtime.BootTime = &now
}
