package main

import (
	"encoding/json"
	"net/http"
	"sort"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

type leaseState struct {
	ID       string `json:"id"`
	VM       string `json:"vm"`
	Snapshot string `json:"snapshot,omitempty"`
	Progress int32  `json:"progress"`
	Reports  int    `json:"reports"`
}

type snapshotState struct {
	VM   string `json:"vm"`
	Name string `json:"name"`
	ID   string `json:"id"`
}

type diskState struct {
	VM       string `json:"vm"`
	Name     string `json:"name"`
	Capacity int64  `json:"capacity"`
	// Paths on this computer: an export streams the first, the guest sees the second.
	Stream string `json:"stream"`
	Raw    string `json:"raw"`
	Sha256 string `json:"sha256,omitempty"`
	File   string `json:"file"`
}

// control is the tests' way in: what is open, what shall go wrong.
func (s *server) control() http.Handler {
	mux := http.NewServeMux()
	write := func(w http.ResponseWriter, value interface{}) {
		w.Header().Set("Content-Type", "application/json")
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		_ = encoder.Encode(value)
	}
	change := func(path string, action func(w http.ResponseWriter, r *http.Request)) {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodPost {
				http.Error(w, "POST", http.StatusMethodNotAllowed)
				return
			}
			action(w, r)
		})
	}
	mux.HandleFunc("/state", func(w http.ResponseWriter, _ *http.Request) { write(w, s.state()) })
	mux.HandleFunc("/disks", func(w http.ResponseWriter, r *http.Request) {
		vm, ok := s.world.find(r.URL.Query().Get("vm"))
		if !ok {
			http.NotFound(w, r)
			return
		}
		states := []diskState{}
		for _, d := range s.world.disksOf(vm) {
			if err := d.prepare(); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			state := diskState{d.vmID(), d.name, d.capacity, d.stream, d.raw, "", datastorePath(d.datastore, d.path)}
			if r.URL.Query().Get("sum") != "" {
				sum, err := d.sum()
				if err != nil {
					http.Error(w, err.Error(), http.StatusInternalServerError)
					return
				}
				state.Sha256 = sum
			}
			states = append(states, state)
		}
		write(w, states)
	})
	change("/fault", func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		vm := ""
		if name := query.Get("vm"); name != "" {
			ref, ok := s.world.find(name)
			if !ok {
				http.NotFound(w, r)
				return
			}
			vm = ref.Value
		}
		switch query.Get("kind") {
		case "expire":
			write(w, map[string]int{"expired": s.expire()})
			return
		case "lease-timeout":
			n := s.leases.killAll("timedOut", timedOut, "The lease timed out.",
				func(l *HttpNfcLease) bool { return vm == "" || l.vm.Value == vm })
			write(w, map[string]int{"ended": n})
			return
		}
		if err := s.faults.add(query, vm); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		write(w, map[string]string{"set": query.Get("kind")})
	})
	change("/clear", func(w http.ResponseWriter, _ *http.Request) {
		s.faults.clear()
		s.leases.forget()
		s.forget()
		write(w, s.state())
	})
	change("/rewrite", func(w http.ResponseWriter, r *http.Request) {
		vm, ok := s.world.find(r.URL.Query().Get("vm"))
		if !ok {
			http.NotFound(w, r)
			return
		}
		for _, d := range s.world.disksOf(vm) {
			if err := d.rewrite(); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
		}
		if r.URL.Query().Get("id") == "1" {
			s.world.renewContentIDs(vm)
		}
		write(w, map[string]string{"vm": vm.Value})
	})
	change("/power", func(w http.ResponseWriter, r *http.Request) {
		vm, ok := s.world.find(r.URL.Query().Get("vm"))
		if !ok {
			http.NotFound(w, r)
			return
		}
		s.world.power(vm, r.URL.Query().Get("on") == "1")
		write(w, map[string]string{"vm": vm.Value})
	})
	return mux
}

func (s *server) state() interface{} {
	s.mutex.Lock()
	sessions := len(s.live)
	calls := map[string]int{}
	for name, n := range s.calls {
		calls[name] = n
	}
	s.mutex.Unlock()

	open := []leaseState{}
	s.leases.mutex.Lock()
	for _, l := range s.leases.byID {
		open = append(open, leaseState{l.id, l.vm.Value, l.snap, l.percent, l.reports})
	}
	counts := map[string]int{}
	for name, n := range s.leases.counts {
		counts[name] = n
	}
	percents := append([]int32{}, s.leases.percents...)
	s.leases.mutex.Unlock()

	snapshots := []snapshotState{}
	for _, entity := range simulator.Map.All("VirtualMachine") {
		vm, ok := entity.(*simulator.VirtualMachine)
		if !ok {
			continue
		}
		simulator.Map.WithLock(vm, func() {
			if vm.Snapshot == nil {
				return
			}
			var walk func([]types.VirtualMachineSnapshotTree)
			walk = func(tree []types.VirtualMachineSnapshotTree) {
				for _, node := range tree {
					snapshots = append(snapshots, snapshotState{vm.Self.Value, node.Name, node.Snapshot.Value})
					walk(node.ChildSnapshotList)
				}
			}
			walk(vm.Snapshot.RootSnapshotList)
		})
	}
	sort.Slice(snapshots, func(a, b int) bool { return snapshots[a].ID < snapshots[b].ID })

	s.faults.mutex.Lock()
	defer s.faults.mutex.Unlock()
	rules := append([]*rule{}, s.faults.rules...)
	hits := map[string]int{}
	for name, n := range s.faults.hits {
		hits[name] = n
	}
	sent := map[string]int64{}
	for name, n := range s.faults.sent {
		sent[name] = n
	}
	return map[string]interface{}{
		"sessions": sessions, "leases": open, "leaseCounts": counts, "snapshots": snapshots, "calls": calls, "faults": rules, "hits": hits,
		"sent": sent, "percents": percents, "tasks": slowTasks.Load(),
	}
}
