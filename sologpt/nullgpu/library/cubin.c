// Registers and stack of the kernels in a cubin: an ELF file, in whose section .nv.info ptxas has written them.
//
// The section is a list of records: format (1 byte), attribute (1 byte), then 2 bytes that are a value, or for the
// format 4 the size of the value that follows. The values that are read here are pairs of 32 bits: the index of the
// kernel in the symbol table, and the number. `cuobjdump --dump-resource-usage` shows the same numbers.

#include "null_gpu.h"

#include <elf.h>

enum { SIZED = 4 };  // format
enum { FRAME_SIZE = 0x11, MIN_STACK_SIZE = 0x12, REGISTER_COUNT = 0x2f };  // attributes

static const char *names_of(const char *image, const Elf64_Shdr *sections, const Elf64_Shdr *table) {
    return image + sections[table->sh_link].sh_offset;
}

static struct kernel *kernel_named(struct kernel **kernels, const char *name) {
    for (struct kernel *kernel = *kernels; kernel; kernel = kernel->next)
        if (!strcmp(kernel->name, name))
            return kernel;
    struct kernel *kernel = calloc(1, sizeof *kernel);
    kernel->name = strdup(name);
    kernel->next = *kernels;
    return *kernels = kernel;
}

static void read_info(struct kernel **kernels, const char *info, size_t size, const Elf64_Sym *symbols,
                      const char *names) {
    for (size_t at = 0; at + 4 <= size;) {
        unsigned char format = info[at], attribute = info[at + 1];
        uint16_t length;
        memcpy(&length, info + at + 2, 2);
        at += 4;
        if (format != SIZED)
            continue;
        uint32_t pair[2];
        bool wanted = attribute == FRAME_SIZE || attribute == MIN_STACK_SIZE || attribute == REGISTER_COUNT;
        if (wanted && length == sizeof pair) {
            memcpy(pair, info + at, sizeof pair);
            struct kernel *kernel = kernel_named(kernels, names + symbols[pair[0]].st_name);
            if (attribute == REGISTER_COUNT)
                kernel->registers = pair[1];
            else if ((int)pair[1] > kernel->stack)
                kernel->stack = pair[1];
        }
        at += length;
    }
}

struct kernel *read_cubin(const void *image) {
    const Elf64_Ehdr *header = image;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG))
        return NULL;
    const char *start = image;
    const Elf64_Shdr *sections = (const void *)(start + header->e_shoff);
    const char *section_names = start + sections[header->e_shstrndx].sh_offset;
    const Elf64_Shdr *table = NULL;
    for (int i = 0; i < header->e_shnum; i++)
        if (sections[i].sh_type == SHT_SYMTAB)
            table = &sections[i];
    struct kernel *kernels = NULL;
    for (int i = 0; table && i < header->e_shnum; i++)
        if (!strcmp(section_names + sections[i].sh_name, ".nv.info"))
            read_info(&kernels, start + sections[i].sh_offset, sections[i].sh_size,
                      (const void *)(start + table->sh_offset), names_of(start, sections, table));
    for (int i = 0; i < header->e_shnum; i++) {
        const char *name = section_names + sections[i].sh_name;
        if (!strncmp(name, ".nv.shared.", 11))
            kernel_named(&kernels, name + 11)->static_shared = sections[i].sh_size;
    }
    return kernels;
}
