/* probe GROUP DEVICE: does with a VFIO group what QEMU does when a VM starts: container, group, IOMMU, a DMA mapping, the
   device (a PCI address or an mdev's UUID), its regions. Exit 0: attachable; 2: the group is not viable; 1: anything else.
   The kernel's Documentation/driver-api/vfio.rst describes the calls. */
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static int checked(int result, const char *what) {
    if (result >= 0) return result;
    fprintf(stderr, "probe: %s: %s\n", what, strerror(errno));
    exit(1);
}

int main(int count, char **arguments) {
    if (count != 3) {
        fprintf(stderr, "usage: probe GROUP DEVICE\n");
        return 1;
    }
    char path[64];
    snprintf(path, sizeof path, "/dev/vfio/%.32s", arguments[1]);
    int container = checked(open("/dev/vfio/vfio", O_RDWR), "/dev/vfio/vfio");
    int group = checked(open(path, O_RDWR), path);
    struct vfio_group_status status = {.argsz = sizeof status};
    checked(ioctl(group, VFIO_GROUP_GET_STATUS, &status), "VFIO_GROUP_GET_STATUS");
    if (!(status.flags & VFIO_GROUP_FLAGS_VIABLE)) {
        printf("group %s is not viable\n", arguments[1]);
        return 2;
    }
    checked(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
    checked(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
    const size_t size = 0x1000;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    checked(memory == MAP_FAILED ? -1 : 0, "mmap");
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof map,
        .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        .vaddr = (uintptr_t)memory,
        .iova = 0x100000,
        .size = size,
    };
    checked(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "VFIO_IOMMU_MAP_DMA");
    int device = checked(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, arguments[2]), arguments[2]);
    struct vfio_device_info info = {.argsz = sizeof info};
    checked(ioctl(device, VFIO_DEVICE_GET_INFO, &info), "VFIO_DEVICE_GET_INFO");
    struct vfio_region_info region = {.argsz = sizeof region, .index = VFIO_PCI_CONFIG_REGION_INDEX};
    checked(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region), "VFIO_DEVICE_GET_REGION_INFO");
    uint16_t id[2];
    checked(pread(device, id, sizeof id, (off_t)region.offset) == sizeof id ? 0 : -1, "configuration space");
    printf("group %s attaches: %s is %04x:%04x with %u regions\n", arguments[1], arguments[2], id[0], id[1], info.num_regions);
    return 0;
}
