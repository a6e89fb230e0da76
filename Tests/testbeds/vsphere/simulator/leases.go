package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// HttpNfcLease is found by clients under this type name.
type HttpNfcLease struct {
	mo.HttpNfcLease
	all *leases

	id    string
	vm    types.ManagedObjectReference
	snap  string
	disks []*disk
	timer *time.Timer
	// Streams of a dead lease end.
	context context.Context
	cancel  context.CancelFunc
	// Progress calls, and the last percentage.
	reports int
	percent int32
}

type leases struct {
	server  *server
	timeout time.Duration
	mutex   sync.Mutex
	byID    map[string]*HttpNfcLease
	counts  map[string]int
	// Of all leases, as they were told.
	percents []int32
}

func newLeases(server *server, timeout time.Duration) *leases {
	return &leases{server: server, timeout: timeout, byID: map[string]*HttpNfcLease{}, counts: map[string]int{}}
}

// exporter stands for a machine or snapshot in ExportVm and ExportSnapshot.
type exporter struct {
	Self   types.ManagedObjectReference
	all    *leases
	entity types.ManagedObjectReference
}

func (e *exporter) Reference() types.ManagedObjectReference { return e.Self }

func (l *leases) exporter(entity types.ManagedObjectReference) types.ManagedObjectReference {
	ref := types.ManagedObjectReference{Type: "ServiceInstance", Value: "export-" + entity.Value}
	if simulator.Map.Get(ref) == nil {
		simulator.Map.Put(&exporter{Self: ref, all: l, entity: entity})
	}
	return ref
}

func (e *exporter) ExportVm(ctx *simulator.Context, _ *types.ExportVm) soap.HasFault {
	vm, ok := simulator.Map.Get(e.entity).(*simulator.VirtualMachine)
	if !ok {
		return &methods.ExportVmBody{Fault_: gone(e.entity)}
	}
	if state := vm.Runtime.PowerState; state != types.VirtualMachinePowerStatePoweredOff {
		return &methods.ExportVmBody{Fault_: simulator.Fault(
			"The attempted operation cannot be performed in the current state (Powered on).",
			&types.InvalidPowerState{RequestedState: types.VirtualMachinePowerStatePoweredOff, ExistingState: state})}
	}
	lease, problem := e.all.open(vm, "")
	if problem != nil {
		return &methods.ExportVmBody{Fault_: problem}
	}
	return &methods.ExportVmBody{Res: &types.ExportVmResponse{Returnval: lease.Self}}
}

func (e *exporter) ExportSnapshot(ctx *simulator.Context, _ *types.ExportSnapshot) soap.HasFault {
	snapshot, ok := simulator.Map.Get(e.entity).(*simulator.VirtualMachineSnapshot)
	if !ok {
		return &methods.ExportSnapshotBody{Fault_: gone(e.entity)}
	}
	vm, ok := simulator.Map.Get(snapshot.Vm).(*simulator.VirtualMachine)
	if !ok {
		return &methods.ExportSnapshotBody{Fault_: gone(snapshot.Vm)}
	}
	lease, problem := e.all.open(vm, e.entity.Value)
	if problem != nil {
		return &methods.ExportSnapshotBody{Fault_: problem}
	}
	return &methods.ExportSnapshotBody{Res: &types.ExportSnapshotResponse{Returnval: lease.Self}}
}

func gone(ref types.ManagedObjectReference) *soap.Fault {
	return simulator.Fault(
		fmt.Sprintf("The object '%s:%s' has already been deleted or has not been completely created", ref.Type, ref.Value),
		&types.ManagedObjectNotFound{Obj: ref})
}

// open makes a lease that gets ready a moment later.
func (l *leases) open(vm *simulator.VirtualMachine, snapshot string) (*HttpNfcLease, *soap.Fault) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	for _, other := range l.byID {
		if other.vm == vm.Self {
			return nil, simulator.Fault("Another task is already in progress.", &types.TaskInProgress{Task: ref{Type: "Task", Value: "task-1"}})
		}
	}
	lease := &HttpNfcLease{all: l, id: uuid.New().String(), vm: vm.Self, snap: snapshot, disks: l.server.world.disks[vm.Self.Value]}
	lease.Self = types.ManagedObjectReference{Type: "HttpNfcLease", Value: "session[" + lease.id + "]" + lease.id}
	lease.context, lease.cancel = context.WithCancel(context.Background())
	lease.State = types.HttpNfcLeaseStateInitializing
	lease.Capabilities = types.HttpNfcLeaseCapabilities{PullModeSupported: false, CorsSupported: false}
	l.byID[lease.id] = lease
	l.counts["opened"]++
	simulator.Map.Put(lease)
	// Counts from when it is ready; making it so may take a busy computer its time.
	lease.timer = time.AfterFunc(l.timeout+time.Minute, func() {
		lease.fail("timedOut", &types.Timedout{}, "The lease timed out.")
	})
	go lease.prepare()
	return lease, nil
}

func (h *HttpNfcLease) prepare() {
	info := &types.HttpNfcLeaseInfo{
		Lease: h.Self, Entity: h.vm, LeaseTimeout: int32((h.all.timeout + time.Second - 1) / time.Second),
	}
	for n, d := range h.disks {
		size, err := d.size()
		if err != nil {
			h.fail("failed", &types.FileFault{File: d.path}, "Cannot read disk "+d.path+": "+err.Error())
			return
		}
		address, print := "*", h.all.server.thumbprint
		if h.all.server.faults.has("nfc-host", h.vm.Value, n) {
			address, print = h.all.server.hostAddress, h.all.server.hostThumbprint
		}
		if h.all.server.faults.has("thumbprint", h.vm.Value, n) {
			print = "00:01:02:03:04:05:06:07:08:09:0A:0B:0C:0D:0E:0F:10:11:12:13"
		}
		isDisk := true
		info.DeviceUrl = append(info.DeviceUrl, types.HttpNfcLeaseDeviceUrl{
			Key:       fmt.Sprintf("/%s/%s", h.vm.Value, d.leaseKey),
			ImportKey: fmt.Sprintf("/%s/%s", d.name, d.leaseKey), Url: fmt.Sprintf("https://%s/nfc/%s/disk-%d.vmdk", address, h.id, n),
			SslThumbprint: print, Disk: &isDisk, TargetId: fmt.Sprintf("disk-%d.vmdk", n), DatastoreKey: d.datastoreURL, FileSize: size,
		})
		info.TotalDiskCapacityInKB += d.capacity / 1024
	}
	// NVRAM travels as well and is no disk.
	noDisk := false
	info.DeviceUrl = append(info.DeviceUrl, types.HttpNfcLeaseDeviceUrl{
		Key: fmt.Sprintf("/%s/nvram", h.vm.Value), ImportKey: "/nvram", Url: fmt.Sprintf("https://*/nfc/%s/disk-nvram.nvram", h.id),
		SslThumbprint: h.all.server.thumbprint, Disk: &noDisk, TargetId: "disk-nvram.nvram", FileSize: 8684,
	})
	simulator.Map.WithLock(h, func() {
		if h.State == types.HttpNfcLeaseStateInitializing {
			h.timer.Reset(h.all.timeout)
			simulator.Map.Update(h, []types.PropertyChange{
				{Name: "info", Val: info}, {Name: "state", Val: types.HttpNfcLeaseStateReady},
			})
		}
	})
}

// end takes a lease away; false when it was over already.
func (h *HttpNfcLease) end(how string) bool {
	h.all.mutex.Lock()
	defer h.all.mutex.Unlock()
	if h.all.byID[h.id] == nil {
		return false
	}
	delete(h.all.byID, h.id)
	h.all.counts[how]++
	h.timer.Stop()
	h.cancel()
	return true
}

// fail puts a lease into the state error, where it stays to be looked at.
func (h *HttpNfcLease) fail(how string, fault types.BaseMethodFault, message string) {
	if !h.end(how) {
		return
	}
	simulator.Map.WithLock(h, func() {
		simulator.Map.Update(h, []types.PropertyChange{
			{Name: "error", Val: &types.LocalizedMethodFault{Fault: fault, LocalizedMessage: message}},
			{Name: "state", Val: types.HttpNfcLeaseStateError},
		})
	})
}

func (h *HttpNfcLease) dead() *soap.Fault {
	if h.State == types.HttpNfcLeaseStateError {
		return simulator.Fault("The lease is in an error state: it timed out or its machine is gone.", &types.Timedout{})
	}
	return nil
}

func (h *HttpNfcLease) HttpNfcLeaseProgress(_ *simulator.Context, r *types.HttpNfcLeaseProgress) soap.HasFault {
	if problem := h.dead(); problem != nil {
		return &methods.HttpNfcLeaseProgressBody{Fault_: problem}
	}
	if r.Percent < 0 || r.Percent > 100 {
		return &methods.HttpNfcLeaseProgressBody{
			Fault_: simulator.Fault("A specified parameter was not correct: percent", &types.InvalidArgument{InvalidProperty: "percent"})}
	}
	h.timer.Reset(h.all.timeout)
	h.all.mutex.Lock()
	h.reports++
	h.percent = r.Percent
	h.all.counts["progress"]++
	h.all.percents = append(h.all.percents, r.Percent)
	h.all.mutex.Unlock()
	h.TransferProgress = r.Percent
	return &methods.HttpNfcLeaseProgressBody{Res: new(types.HttpNfcLeaseProgressResponse)}
}

func (h *HttpNfcLease) HttpNfcLeaseComplete(_ *simulator.Context, r *types.HttpNfcLeaseComplete) soap.HasFault {
	if problem := h.dead(); problem != nil {
		return &methods.HttpNfcLeaseCompleteBody{Fault_: problem}
	}
	h.end("completed")
	go simulator.Map.Remove(r.This)
	return &methods.HttpNfcLeaseCompleteBody{Res: new(types.HttpNfcLeaseCompleteResponse)}
}

func (h *HttpNfcLease) HttpNfcLeaseAbort(_ *simulator.Context, r *types.HttpNfcLeaseAbort) soap.HasFault {
	h.end("aborted")
	go simulator.Map.Remove(r.This)
	return &methods.HttpNfcLeaseAbortBody{Res: new(types.HttpNfcLeaseAbortResponse)}
}

// forget clears the progress that leases were told.
func (l *leases) forget() {
	l.mutex.Lock()
	l.percents = nil
	l.mutex.Unlock()
}

// killAll times out what is open.
func (l *leases) killAll(how string, fault types.BaseMethodFault, message string, match func(*HttpNfcLease) bool) int {
	l.mutex.Lock()
	var found []*HttpNfcLease
	for _, lease := range l.byID {
		if match(lease) {
			found = append(found, lease)
		}
	}
	l.mutex.Unlock()
	for _, lease := range found {
		lease.fail(how, fault, message)
	}
	return len(found)
}
