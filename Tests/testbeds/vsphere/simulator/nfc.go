package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/types"
)

type reader = io.ReaderAt
type faultType = types.BaseMethodFault

var timedOut = &types.Timedout{}

func (d *disk) vmID() string { return d.vm.Value }

// nfc streams the disks of a lease. The path holds the lease's secret id; no session is needed, ranges are ignored.
func (s *server) nfc(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/nfc/"), "/")
	if len(parts) != 2 || r.Method != http.MethodGet && r.Method != http.MethodHead {
		http.NotFound(w, r)
		return
	}
	s.leases.mutex.Lock()
	lease := s.leases.byID[parts[0]]
	s.leases.mutex.Unlock()
	if lease == nil {
		http.NotFound(w, r)
		return
	}
	if parts[1] == "disk-nvram.nvram" {
		_, _ = w.Write(make([]byte, 8684))
		return
	}
	index, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(parts[1], "disk-"), ".vmdk"))
	if err != nil || index < 0 || index >= len(lease.disks) {
		http.NotFound(w, r)
		return
	}
	d := lease.disks[index]
	if s.faults.answer(w, r, "nfc", d.vmID(), index) {
		return
	}
	if err := d.prepare(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	file, err := os.Open(d.stream)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/x-vnd.vmware-streamVmdk")
	w.Header().Set("Accept-Ranges", "none")
	// The real ones don't know the length beforehand.
	if s.faults.has("length", d.vmID(), index) {
		w.Header().Set("Content-Length", fmt.Sprint(info.Size()))
	}
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodGet {
		s.body(w, lease, d, index, "nfc", file, 0, info.Size())
	}
}

// folder serves files of datastores to sessions, with ranges.
func (s *server) folder(w http.ResponseWriter, r *http.Request) {
	user, password, basic := r.BasicAuth()
	if !(basic && user == s.user && password == s.password) && !s.authenticated(r) {
		w.Header().Set("WWW-Authenticate", `Basic realm="VMware HTTP server"`)
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	}
	query := r.URL.Query()
	name := strings.TrimPrefix(r.URL.Path, "/folder/")
	d, index, flat := s.world.file(query.Get("dcPath"), query.Get("dsName"), name)
	if d == nil {
		http.NotFound(w, r)
		return
	}
	if s.faults.answer(w, r, "folder", d.vmID(), index) {
		return
	}
	if err := d.prepare(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	var from reader
	var size int64
	if flat {
		file, err := os.Open(d.raw)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		defer file.Close()
		from, size = file, d.capacity
	} else {
		text := d.descriptor()
		from, size = strings.NewReader(text), int64(len(text))
	}
	tag, changed, err := d.validators()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if !s.faults.has("no-tag", d.vmID(), index) {
		w.Header().Set("ETag", tag)
		w.Header().Set("Last-Modified", changed)
	}
	// Of other content than the client has, all is sent.
	condition := r.Header.Get("If-Range")
	isCurrent := condition == "" || condition == tag || condition == changed
	first, count, status := int64(0), size, http.StatusOK
	if wanted := r.Header.Get("Range"); wanted != "" && isCurrent && !s.ignoresRange(d, index) {
		var ok bool
		if first, count, ok = span(wanted, size); !ok {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		status = http.StatusPartialContent
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, first+count-1, size))
	}
	if _, is := s.faults.take("folder", d.vmID(), index, "encoded")["encoded"]; is {
		w.Header().Set("Content-Encoding", "gzip")
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Accept-Ranges", "bytes")
	w.Header().Set("Content-Length", fmt.Sprint(count))
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		s.body(w, nil, d, index, "folder", from, first, count)
	}
}

func (s *server) ignoresRange(d *disk, index int) bool {
	_, is := s.faults.take("folder", d.vmID(), index, "range200")["range200"]
	return is
}

// span reads "bytes=FIRST-[LAST]".
func span(text string, size int64) (first, count int64, ok bool) {
	bounds := strings.SplitN(strings.TrimPrefix(text, "bytes="), "-", 2)
	first, err := strconv.ParseInt(bounds[0], 10, 64)
	if err != nil || len(bounds) != 2 || first >= size || first < 0 {
		return 0, 0, false
	}
	last := size - 1
	if bounds[1] != "" {
		if last, err = strconv.ParseInt(bounds[1], 10, 64); err != nil || last < first {
			return 0, 0, false
		}
		if last >= size {
			last = size - 1
		}
	}
	return first, last - first + 1, true
}

func (d *disk) descriptor() string {
	return fmt.Sprintf("# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=%08x\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\n"+
		"# Extent description\nRW %d VMFS \"%s\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\nddb.virtualHWVersion = \"17\"\n",
		uint32(d.seed)|1, d.capacity/sector, strings.TrimSuffix(path.Base(d.path), ".vmdk")+"-flat.vmdk")
}

// file finds the disk a path of a datastore belongs to, and whether it is the content's.
func (w *world) file(datacenter, datastore, name string) (*disk, int, bool) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	for id, disks := range w.disks {
		if datacenter != "" && w.datacenters[id] != strings.TrimPrefix(datacenter, "/") && datacenter != "ha-datacenter" {
			continue
		}
		for index, d := range disks {
			if d.datastore != datastore {
				continue
			}
			switch name {
			case d.path:
				return d, index, false
			case strings.TrimSuffix(d.path, ".vmdk") + "-flat.vmdk":
				return d, index, true
			}
		}
	}
	return nil, 0, false
}

func datastorePath(datastore, name string) string {
	return (&object.DatastorePath{Datastore: datastore, Path: name}).String()
}
