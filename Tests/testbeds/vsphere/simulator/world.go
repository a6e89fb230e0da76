package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"math/rand"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

type ref = types.ManagedObjectReference

// world is the inventory: govmomi's model, its machines' disks, and where everything is.
type world struct {
	model  *simulator.Model
	client *vim25.Client
	store  *diskStore
	random *rand.Rand
	page   int

	places []place

	mutex       sync.Mutex
	disks       map[string][]*disk
	datacenters map[string]string
	byName      map[string]ref
}

// place is somewhere a machine can be: a host with its pool, its datacenter's folders, datastores and networks.
type place struct {
	datacenter string
	host       *simulator.HostSystem
	pool       ref
	folders    []ref
	datastores []*simulator.Datastore
	networks   []ref
}

func newWorld(o options, store *diskStore) (*world, error) {
	pages.size = o.page
	model := simulator.VPX()
	if o.esx {
		model = simulator.ESX()
		model.Datastore = 2
	} else {
		model.Datacenter, model.Cluster, model.ClusterHost, model.Host = 2, 2, 2, 1
		model.Datastore, model.Portgroup, model.Pool = 3, 2, 0
	}
	model.Machine, model.Autostart = 0, false
	// Clients hide from themselves what came after the version a server states.
	about := &model.ServiceContent.About
	about.ApiVersion, about.Version = "6.7", "6.7.0"
	about.FullName = strings.Replace(about.FullName, "6.5.0", "6.7.0", 1)
	if err := model.Create(); err != nil {
		return nil, err
	}
	w := &world{
		model: model, store: store, random: rand.New(rand.NewSource(o.seed)),
		disks: map[string][]*disk{}, datacenters: map[string]string{}, byName: map[string]ref{},
	}
	client, err := vim25.NewClient(context.Background(), model.Service)
	if err != nil {
		return nil, err
	}
	w.client = client
	instance := simulator.Map.Get(vim25.ServiceInstance).(*simulator.ServiceInstance)
	instance.Content.About.InstanceUuid = seededUUID(w.random)
	w.nameThings(o.esx)
	if err := w.findPlaces(); err != nil {
		return nil, err
	}
	for n := range w.places {
		w.equipHost(w.places[n].host, n)
	}
	if err := w.realMachines(o.machines); err != nil {
		return nil, err
	}
	for n := 0; n < o.vms; n++ {
		p := w.places[w.random.Intn(len(w.places))]
		m := w.randomMachine(n, p)
		if err := w.create(m, p); err != nil {
			return nil, fmt.Errorf("%s: %w", m.Name, err)
		}
	}
	return w, nil
}

// entities returns all objects of a kind in a steady order.
func entities(kind string) []mo.Entity {
	all := simulator.Map.All(kind)
	sort.Slice(all, func(a, b int) bool {
		x, y := all[a].Reference().Value, all[b].Reference().Value
		return len(x) < len(y) || len(x) == len(y) && x < y
	})
	return all
}

var hostNames = []string{"esx-a1", "esx-a2", "esx-b1", "esx-b2", "esx-solo"}

// nameThings gives names as people give them: with spaces, umlauts, ampersands and kanji.
func (w *world) nameThings(esx bool) {
	stores := simulator.Map.All("Datastore")
	// Their ids hold the names of temporary folders, another each time.
	sort.Slice(stores, func(a, b int) bool {
		x, y := stores[a].Entity(), stores[b].Entity()
		return x.Name < y.Name || x.Name == y.Name && x.Parent.Value < y.Parent.Value
	})
	for n, e := range stores {
		ds := e.(*simulator.Datastore)
		name := []string{"ssd pool 1", "Speicher Süd", "nvme & sas", "データ"}[n%4]
		if n >= 4 {
			name += fmt.Sprint(" ", n)
		}
		ds.Name, ds.Summary.Name, ds.Info.GetDatastoreInfo().Name = name, name, name
		ds.Summary.Capacity, ds.Summary.FreeSpace = 4<<40, int64(1+w.random.Intn(4095))<<30
		ds.Info.GetDatastoreInfo().FreeSpace = ds.Summary.FreeSpace
	}
	if esx {
		return
	}
	for n, e := range entities("Datacenter") {
		e.(*simulator.Datacenter).Name = []string{"Zürich DC", "R&D"}[n%2]
	}
	for n, e := range entities("ClusterComputeResource") {
		e.(*simulator.ClusterComputeResource).Name = []string{"GPU-Cluster", "general & edge"}[n%2] + []string{"", " 2"}[n/2%2]
	}
	for n, e := range entities("HostSystem") {
		host := e.(*simulator.HostSystem)
		host.Name = fmt.Sprintf("%s.dc%d.example", hostNames[n%len(hostNames)], n/len(hostNames))
		host.Summary.Config.Name = host.Name
	}
	for n, e := range entities("DistributedVirtualPortgroup") {
		group := e.(*simulator.DistributedVirtualPortgroup)
		name := []string{"Storage Network", "Büro & Labor", "prod-vlan-120", "開発"}[n%4]
		group.Name, group.Config.Name = name, name
		if network, ok := group.Summary.(*types.NetworkSummary); ok && network != nil {
			network.Name = name
		}
	}
}

func (w *world) findPlaces() error {
	vpx := simulator.Map.IsVPX()
	for n, e := range entities("Datacenter") {
		dc := e.(*simulator.Datacenter)
		folder := object.NewFolder(w.client, dc.VmFolder)
		folders := []ref{dc.VmFolder}
		if vpx {
			production, err := folder.CreateFolder(context.Background(), []string{"Produktion", "Teams & Projects"}[n%2])
			if err != nil {
				return err
			}
			inner, err := production.CreateFolder(context.Background(), []string{"Web–Ebene", "ml"}[n%2])
			if err != nil {
				return err
			}
			folders = append(folders, production.Reference(), inner.Reference())
		}
		for _, e := range entities("HostSystem") {
			host := e.(*simulator.HostSystem)
			parent := simulator.Map.Get(*host.Parent)
			var pool ref
			var networks []ref
			var above *ref
			switch owner := parent.(type) {
			case *simulator.ClusterComputeResource:
				pool, networks, above = *owner.ResourcePool, owner.Network, owner.Parent
			case *mo.ComputeResource:
				pool, networks, above = *owner.ResourcePool, owner.Network, owner.Parent
			}
			if above == nil || *above != dc.HostFolder {
				continue
			}
			p := place{datacenter: dc.Name, host: host, pool: pool, folders: folders, networks: networks}
			if vpx {
				p.networks = dc.Network
			}
			for _, ds := range host.Datastore {
				p.datastores = append(p.datastores, simulator.Map.Get(ds).(*simulator.Datastore))
			}
			w.places = append(w.places, p)
		}
	}
	if len(w.places) == 0 {
		return fmt.Errorf("no hosts")
	}
	return nil
}

// create adds a machine. The simulator makes it without devices of ours, which follow.
func (w *world) create(m *machine, p place) error {
	store := p.datastores[m.datastore%len(p.datastores)]
	spec := types.VirtualMachineConfigSpec{
		Name: m.Name, GuestId: string(types.VirtualMachineGuestOsIdentifierOtherGuest),
		Files: &types.VirtualMachineFileInfo{VmPathName: datastorePath(store.Name, m.directory()+"/"+m.directory()+".vmx")},
	}
	folder := p.folders[m.folder%len(p.folders)]
	if m.Folder != "" {
		for _, f := range p.folders {
			if simulator.Map.Get(f).(*simulator.Folder).Name == m.Folder {
				folder = f
			}
		}
	}
	host := p.host.Self
	answer, err := methods.CreateVM_Task(context.Background(), w.client, &types.CreateVM_Task{
		This: folder, Config: spec, Pool: p.pool, Host: &host,
	})
	if err != nil {
		return err
	}
	// Tasks of the simulator are over when the call returns.
	task := simulator.Map.Get(answer.Returnval).(*simulator.Task)
	if task.Info.Error != nil {
		return fmt.Errorf("%T", task.Info.Error.Fault)
	}
	id := task.Info.Result.(ref)
	simulator.Map.Remove(answer.Returnval)
	vm := simulator.Map.Get(id).(*simulator.VirtualMachine)
	w.datacenters[id.Value] = p.datacenter
	w.byName[m.Name] = id
	w.configure(vm, m, p, store)
	return nil
}

// realMachines adds the machines of a folder, NAME/machine.json with NAME/disk1.vmdk and so on.
func (w *world) realMachines(folder string) error {
	if folder == "" {
		return nil
	}
	found, err := filepath.Glob(filepath.Join(folder, "*", "machine.json"))
	if err != nil {
		return err
	}
	sort.Strings(found)
	for _, path := range found {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		m := &machine{}
		if err := json.Unmarshal(text, m); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for n := range m.Disks {
			d := &m.Disks[n]
			d.capacity = d.CapacityMB << 20
			if d.Mode == "" {
				d.Mode = "persistent"
			}
		}
		if m.PoweredOn {
			m.powered, m.tools = types.VirtualMachinePowerStatePoweredOn, true
		}
		for n := 1; ; n++ {
			stream := filepath.Join(filepath.Dir(path), fmt.Sprintf("disk%d.vmdk", n))
			if _, err := os.Stat(stream); err != nil {
				break
			}
			m.Disks = append(m.Disks, machineDisk{stream: stream, Mode: "persistent", Thin: true})
		}
		if err := w.create(m, w.places[0]); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

func (w *world) find(name string) (ref, bool) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	if id, ok := w.byName[name]; ok {
		return id, true
	}
	id := ref{Type: "VirtualMachine", Value: name}
	return id, simulator.Map.Get(id) != nil
}

func (w *world) disksOf(vm ref) []*disk {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return w.disks[vm.Value]
}

func (w *world) power(id ref, on bool) {
	vm, ok := simulator.Map.Get(id).(*simulator.VirtualMachine)
	if !ok {
		return
	}
	state := types.VirtualMachinePowerStatePoweredOff
	if on {
		state = types.VirtualMachinePowerStatePoweredOn
	}
	simulator.Map.WithLock(vm, func() {
		simulator.Map.Update(vm, []types.PropertyChange{
			{Name: "runtime.powerState", Val: state}, {Name: "summary.runtime.powerState", Val: state},
		})
	})
}

// eachDisk changes what each disk of a machine lies in.
func eachDisk(id ref, change func(*types.VirtualDiskFlatVer2BackingInfo)) {
	vm, ok := simulator.Map.Get(id).(*simulator.VirtualMachine)
	if !ok {
		return
	}
	simulator.Map.WithLock(vm, func() {
		for _, device := range vm.Config.Hardware.Device {
			if disk, is := device.(*types.VirtualDisk); is {
				if backing, flat := disk.Backing.(*types.VirtualDiskFlatVer2BackingInfo); flat {
					change(backing)
				}
			}
		}
	})
}

// renewContentIDs says of each disk of a machine what a server says once it was written to.
func (w *world) renewContentIDs(id ref) {
	eachDisk(id, func(backing *types.VirtualDiskFlatVer2BackingInfo) { backing.ContentId = seededUUID(w.random) })
}

// branch has the machine write to other files, which no snapshot of it lists: it needs consolidation.
func (w *world) branch(id ref) {
	eachDisk(id, func(backing *types.VirtualDiskFlatVer2BackingInfo) {
		backing.FileName = strings.TrimSuffix(backing.FileName, ".vmdk") + "-000001.vmdk"
	})
}

// merge removes a machine's snapshots, as a backup's clean-up does.
func (w *world) merge(id ref) {
	_, err := methods.RemoveAllSnapshots_Task(context.Background(), w.client, &types.RemoveAllSnapshots_Task{This: id})
	if err != nil {
		log.Print(err)
	}
}

// remove deletes a machine whatever it is doing.
func (w *world) remove(value string) {
	id := ref{Type: "VirtualMachine", Value: value}
	w.power(id, false)
	_, err := methods.Destroy_Task(context.Background(), w.client, &types.Destroy_Task{This: id})
	if err != nil {
		log.Print(err)
	}
	w.mutex.Lock()
	defer w.mutex.Unlock()
	delete(w.disks, value)
}
