package main

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"github.com/vmware/govmomi/vim25/types"
)

// disk is one virtual disk: what an export streams, and what the datastore holds.
type disk struct {
	vm           types.ManagedObjectReference
	name         string // the machine's
	leaseKey     string
	datastore    string
	datastoreURL string
	// Path of the descriptor within the datastore, "folder/name.vmdk"; the content is in "folder/name-flat.vmdk".
	path     string
	capacity int64
	seed     int64

	store *diskStore
	once  sync.Once
	err   error
	// A streamOptimized VMDK, and the guest's view of it; given, or made when first asked for.
	stream string
	raw    string
}

type diskStore struct{ folder string }

func newDiskStore(folder string) *diskStore { return &diskStore{folder} }

func (d *disk) prepare() error {
	d.once.Do(func() {
		if d.stream != "" {
			return
		}
		if d.err = os.MkdirAll(d.store.folder, 0700); d.err != nil {
			return
		}
		base := filepath.Join(d.store.folder, fmt.Sprintf("%016x", uint64(d.seed)))
		d.stream, d.raw = base+".vmdk", base+".raw"
		d.err = generate(d)
	})
	return d.err
}

func (d *disk) size() (int64, error) {
	if err := d.prepare(); err != nil {
		return 0, err
	}
	info, err := os.Stat(d.stream)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// validators tell the file's content from any it had before or will have: an ETag, and when it changed last.
func (d *disk) validators() (tag, changed string, err error) {
	info, err := os.Stat(d.raw)
	if err != nil {
		return "", "", err
	}
	return fmt.Sprintf("\"%x-%x\"", info.Size(), info.ModTime().UnixNano()), info.ModTime().UTC().Format(http.TimeFormat), nil
}

// rewrite changes the content that the datastore holds, not what an export streams.
func (d *disk) rewrite() error {
	if err := d.prepare(); err != nil {
		return err
	}
	file, err := os.OpenFile(d.raw, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	for _, at := range []int64{0, d.capacity / 2} {
		piece := make([]byte, sector)
		if _, err := file.ReadAt(piece, at); err != nil {
			return err
		}
		for n := range piece {
			piece[n] ^= 0x5a
		}
		if _, err := file.WriteAt(piece, at); err != nil {
			return err
		}
	}
	return nil
}

// sum is the SHA-256 of what the guest sees.
func (d *disk) sum() (string, error) {
	if err := d.prepare(); err != nil {
		return "", err
	}
	file, err := os.Open(d.raw)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, bufio.NewReaderSize(file, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

const (
	sector     = 512
	grain      = 128 // sectors
	tableSlots = 512
)

// generate writes a disk of a few random grains, as raw and as streamOptimized (VMware Virtual Disk Format 5.0), together.
func generate(d *disk) error {
	raw, err := os.Create(d.raw)
	if err != nil {
		return err
	}
	defer raw.Close()
	if err := raw.Truncate(d.capacity); err != nil {
		return err
	}
	file, err := os.Create(d.stream)
	if err != nil {
		return err
	}
	defer file.Close()
	out := &sectors{w: bufio.NewWriterSize(file, 1<<20)}

	random := rand.New(rand.NewSource(d.seed))
	total := (d.capacity + grain*sector - 1) / (grain * sector)
	data := map[int64]bool{0: true, total - 1: true}
	for count := 8 + random.Intn(120); count > 0; count-- {
		start := random.Int63n(total)
		for n := start; n < total && n < start+int64(1+random.Intn(8)); n++ {
			data[n] = true
		}
	}

	descriptor := fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n"+
		"# Extent description\nRDONLY %d SPARSE \"call-me-stream.vmdk\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"+
		"ddb.geometry.cylinders = \"%d\"\nddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.virtualHWVersion = \"17\"\n",
		uint32(d.seed)|1, d.capacity/sector, d.capacity/sector/255/63)
	header := func(directory uint64) []byte {
		b := make([]byte, sector)
		copy(b, "KDMV")
		le := binary.LittleEndian
		le.PutUint32(b[4:], 3)
		le.PutUint32(b[8:], 1|1<<16|1<<17)
		le.PutUint64(b[12:], uint64(d.capacity/sector))
		le.PutUint64(b[20:], grain)
		if directory == ^uint64(0) {
			le.PutUint64(b[28:], 1)
			le.PutUint64(b[36:], 20)
		}
		le.PutUint32(b[44:], tableSlots)
		le.PutUint64(b[56:], directory)
		le.PutUint64(b[64:], grain)
		b[73], b[74], b[75], b[76] = '\n', ' ', '\r', '\n'
		le.PutUint16(b[77:], 1)
		return b
	}
	out.write(header(^uint64(0)))
	out.write(append([]byte(descriptor), make([]byte, 20*sector-len(descriptor))...))
	out.padTo(grain)

	marker := func(count uint64, kind uint32) {
		b := make([]byte, sector)
		binary.LittleEndian.PutUint64(b, count)
		binary.LittleEndian.PutUint32(b[12:], kind)
		out.write(b)
	}
	tables := (total + tableSlots - 1) / tableSlots
	directory := make([]uint32, (tables+127)/128*128)
	content := make([]byte, grain*sector)
	for t := int64(0); t < tables; t++ {
		var table [tableSlots]uint32
		used := false
		for slot := int64(0); slot < tableSlots && t*tableSlots+slot < total; slot++ {
			n := t*tableSlots + slot
			if !data[n] {
				continue
			}
			used = true
			// Half of each grain can be compressed.
			random.Read(content[:len(content)/2])
			copy(content[len(content)/2:], bytes.Repeat([]byte(fmt.Sprintf("grain %12d\n", n)), len(content)/2/19+1))
			piece := content
			if rest := d.capacity - n*grain*sector; rest < int64(len(piece)) {
				piece = append(append([]byte{}, content[:rest]...), make([]byte, int64(len(content))-rest)...)
			}
			end := d.capacity - n*grain*sector
			if end > int64(len(piece)) {
				end = int64(len(piece))
			}
			if _, err := raw.WriteAt(piece[:end], n*grain*sector); err != nil {
				return err
			}
			var packed bytes.Buffer
			deflate, _ := zlib.NewWriterLevel(&packed, zlib.BestSpeed)
			_, _ = deflate.Write(piece)
			_ = deflate.Close()
			table[slot] = uint32(out.at)
			head := make([]byte, 12)
			binary.LittleEndian.PutUint64(head, uint64(n*grain))
			binary.LittleEndian.PutUint32(head[8:], uint32(packed.Len()))
			out.write(head)
			out.write(packed.Bytes())
			out.pad()
		}
		if used {
			marker(tableSlots*4/sector, 1)
			directory[t] = uint32(out.at)
			_ = binary.Write(out, binary.LittleEndian, table[:])
			out.pad()
		}
	}
	marker(uint64(len(directory)*4/sector), 2)
	at := out.at
	_ = binary.Write(out, binary.LittleEndian, directory)
	out.pad()
	marker(1, 3)
	out.write(header(at))
	out.write(make([]byte, sector))
	if out.err != nil {
		return out.err
	}
	return out.w.Flush()
}

// sectors counts what it writes in sectors of 512 bytes.
type sectors struct {
	w    *bufio.Writer
	at   uint64
	part int
	err  error
}

func (s *sectors) write(b []byte) { _, _ = s.Write(b) }

func (s *sectors) Write(b []byte) (int, error) {
	n, err := s.w.Write(b)
	if err != nil {
		s.err = err
	}
	s.part += n
	s.at += uint64(s.part / sector)
	s.part %= sector
	return n, err
}

func (s *sectors) pad() {
	if s.part != 0 {
		s.write(make([]byte, sector-s.part))
	}
}

func (s *sectors) padTo(sectors uint64) {
	s.pad()
	for s.at < sectors {
		s.write(make([]byte, sector))
	}
}
