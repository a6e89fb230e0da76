package main

import (
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// slowTask stands for an object in a call whose task takes a while. The simulator's own tasks have ended when they are told of.
type slowTask struct {
	Self   types.ManagedObjectReference
	entity types.ManagedObjectReference
	after  time.Duration
}

// slowTasks that have not ended.
var slowTasks atomic.Int64

func (t *slowTask) Reference() types.ManagedObjectReference { return t.Self }

// slowly is the object to call instead, or the same one when no fault asks for it.
func (s *server) slowly(method string, entity types.ManagedObjectReference) types.ManagedObjectReference {
	vm := entity
	if snapshot, ok := simulator.Map.Get(entity).(*simulator.VirtualMachineSnapshot); ok {
		vm = snapshot.Vm
	}
	kind := map[string]string{"CreateSnapshot_Task": "slow-snapshot", "RemoveSnapshot_Task": "slow-removal"}[method]
	rule, is := s.faults.take("", vm.Value, 0, kind)[kind]
	if !is {
		return entity
	}
	ref := types.ManagedObjectReference{Type: "ServiceInstance", Value: "slow-" + entity.Value}
	simulator.Map.Put(&slowTask{Self: ref, entity: entity, after: time.Duration(rule.After) * time.Millisecond})
	return ref
}

func (t *slowTask) CreateSnapshotTask(req *types.CreateSnapshot_Task) soap.HasFault {
	vm, ok := simulator.Map.Get(t.entity).(*simulator.VirtualMachine)
	if !ok {
		return &methods.CreateSnapshot_TaskBody{Fault_: gone(t.entity)}
	}
	task := t.run(vm, vm, "createSnapshot", func() types.ManagedObjectReference {
		body := vm.CreateSnapshotTask(req).(*methods.CreateSnapshot_TaskBody)
		return body.Res.Returnval
	})
	return &methods.CreateSnapshot_TaskBody{Res: &types.CreateSnapshot_TaskResponse{Returnval: task}}
}

func (t *slowTask) RemoveSnapshotTask(ctx *simulator.Context, req *types.RemoveSnapshot_Task) soap.HasFault {
	snapshot, ok := simulator.Map.Get(t.entity).(*simulator.VirtualMachineSnapshot)
	if !ok {
		return &methods.RemoveSnapshot_TaskBody{Fault_: gone(t.entity)}
	}
	vm, ok := simulator.Map.Get(snapshot.Vm).(*simulator.VirtualMachine)
	if !ok {
		return &methods.RemoveSnapshot_TaskBody{Fault_: gone(snapshot.Vm)}
	}
	call := *req
	call.This = t.entity
	task := t.run(vm, snapshot, "removeSnapshot", func() types.ManagedObjectReference {
		body := snapshot.RemoveSnapshotTask(ctx, &call).(*methods.RemoveSnapshot_TaskBody)
		return body.Res.Returnval
	})
	return &methods.RemoveSnapshot_TaskBody{Res: &types.RemoveSnapshot_TaskResponse{Returnval: task}}
}

// run tells of a task at once and does the work later. Nothing can cancel it.
func (t *slowTask) run(
	vm *simulator.VirtualMachine, of mo.Reference, name string, work func() types.ManagedObjectReference,
) types.ManagedObjectReference {
	task := simulator.CreateTask(of, name, nil)
	update := func(changes ...types.PropertyChange) {
		simulator.Map.WithLock(task, func() { simulator.Map.Update(task, changes) })
	}
	update(types.PropertyChange{Name: "info.state", Val: types.TaskInfoStateRunning})
	recent := func(tasks []types.ManagedObjectReference) {
		simulator.Map.WithLock(vm, func() {
			simulator.Map.Update(vm, []types.PropertyChange{{Name: "recentTask", Val: tasks}})
		})
	}
	recent([]types.ManagedObjectReference{task.Self})
	slowTasks.Add(1)
	go func() {
		defer slowTasks.Add(-1)
		time.Sleep(t.after)
		done := simulator.Map.Get(work()).(*simulator.Task)
		update(
			types.PropertyChange{Name: "info.result", Val: done.Info.Result},
			types.PropertyChange{Name: "info.state", Val: types.TaskInfoStateSuccess})
		recent(nil)
	}()
	return task.Self
}
